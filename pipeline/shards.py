"""Samples by number from the tars that `make shards` wrote: one seek and one read each."""

import io
import json
import tarfile
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from streaming.base.format.base.reader import FileInfo, SplitReader
from webdataset.tariterators import tar_file_iterator


class TarReader(SplitReader):
    """One shard as mosaicml-streaming's readers are: `reader[i]` is a dict of member name to bytes."""

    def __init__(self, dirname: Path, shard: dict[str, Any]) -> None:
        data, meta = FileInfo(**shard["raw_data"]), FileInfo(**shard["raw_meta"])
        hashes, samples, size_limit = shard["hashes"], shard["samples"], shard["size_limit"]
        super().__init__(str(dirname), None, None, hashes, data, meta, samples, size_limit, None, None)
        self.path = dirname / data.basename
        self.sidecar = json.loads((dirname / meta.basename).read_text())

    def get_sample_data(self, idx: int) -> bytes:
        """Returns the bytes of sample `idx`: its tar members, headers and padding included, checked against its CRC."""
        data = self._read(idx, self.sidecar["sizes"][idx])
        if zlib.crc32(data) != self.sidecar["checksums"][idx]:
            raise ValueError(
                f"{self.path}: sample {idx} is damaged (checksum); delete this tar and run `make shards` again"
            )
        return data

    def decode_sample(self, data: bytes) -> dict[str, bytes]:
        """Returns the members of a sample by name without the key: `json`, `jpg`, `0.png`, ..."""
        stream: Any = io.BytesIO(data)
        return {member["fname"].partition(".")[2]: member["data"] for member in tar_file_iterator(stream)}

    def get_record(self, idx: int) -> dict[str, Any]:
        """Returns the record of sample `idx` without reading its images: it is the sample's first member."""
        header = tarfile.TarInfo.frombuf(self._read(idx, tarfile.BLOCKSIZE), "utf-8", "strict")
        return json.loads(self._read(idx, tarfile.BLOCKSIZE + header.size)[tarfile.BLOCKSIZE :])

    def _read(self, idx: int, num_bytes: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.sidecar["offsets"][idx])
            data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise ValueError(f"{self.path}: sample {idx} is cut short; run `make shards` again to rewrite this shard")
        return data


class ShardSet:
    """All samples of a shard folder, numbered from 0 in shard order."""

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ValueError(
                f"{folder}: no finished shards here (no manifest.json); run `make shards OUT={folder}` first"
            )
        self.manifest = json.loads(manifest.read_text())
        self.fingerprint: str = self.manifest["fingerprint"]
        index = json.loads((folder / "index.json").read_text())
        self.readers = [TarReader(folder, shard) for shard in index["shards"]]
        self.shard_sizes = [len(reader) for reader in self.readers]
        self._ends = list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, number: int) -> dict[str, Any]:
        """Returns the record of a sample, images unread."""
        reader, idx = self._locate(number)
        return reader.get_record(idx)

    def members(self, number: int) -> dict[str, bytes]:
        """Returns every member of a sample by name: its record as `json` and its images."""
        reader, idx = self._locate(number)
        return reader[idx]

    def _locate(self, number: int) -> tuple[TarReader, int]:
        shard = bisect_right(self._ends, number)
        return self.readers[shard], number - (self._ends[shard] - self.shard_sizes[shard])
