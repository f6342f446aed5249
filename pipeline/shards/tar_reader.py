"""One shard as mosaicml-streaming reads it: a tar that `make shards` wrote, and the sidecar that is its map.

A sample is a run of whole 512-byte blocks, its record first (see `data_prep.tar_writer`), so one `pread` brings all of
it and nothing is searched for.
"""

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from streaming.base.format.base.reader import FileInfo, SplitReader

from common.json_files import parse_json
from data_prep.listings import IndexShard
from data_prep.tar_writer import BLOCK_BYTES

RECORD_GUESS_BYTES = 8192  # header and record of nearly every sample; longer ones cost a second read


class DamagedShard(ValueError):
    """The bytes of a shard are not those that index.json and the sidecar promise."""


class OpenFile:
    """A file open for reading at any location, by any thread; closed when nobody holds this object any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_whole(path: Path, info: FileInfo, verify: bool) -> OpenFile:
    """Returns a file of the size that the index tells and, with `verify`, of the content.

    Raises:
        DamagedShard: It is not there, or another.
    """
    try:
        file = OpenFile(path)
    except FileNotFoundError:
        raise DamagedShard(f"{path} is not there") from None
    if (num_bytes := os.fstat(file.descriptor).st_size) != info.bytes:
        raise DamagedShard(f"{path} has {num_bytes:,} bytes instead of {info.bytes:,}")
    if verify:
        with open(file.descriptor, "rb", closefd=False) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != info.hashes["sha256"]:
                raise DamagedShard(f"{path} has another SHA-256 than in index.json")
    return file


class Slots(NamedTuple):
    """Where the samples of a shard lie: 20 bytes each, against 200 as lists."""

    offsets: array
    sizes: array
    checksums: array


class TarReader(SplitReader):
    """One shard as mosaicml-streaming's readers are: `reader[i]` is a dict of member name to bytes."""

    def __init__(self, folder: Path, shard: IndexShard, in_place: bool) -> None:
        """Takes an entry of index.json. Files that are read in place are the only ones there are: never remove them."""
        data, meta = (FileInfo(file.basename, file.bytes, {**file.hashes}) for file in (shard.raw_data, shard.raw_meta))
        sizes = shard.samples, shard.size_limit
        super().__init__(str(folder), None, None, [*shard.hashes], data, meta, *sizes, None, None)
        self.path, self.sidecar_path, self.in_place = folder / data.basename, folder / meta.basename, in_place
        self.slots: Slots | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "slots": None}

    def sidecar(self) -> dict[str, Any]:
        """Returns the sidecar as it was written.

        Raises:
            FileNotFoundError: It is not there (yet).
            DamagedShard: It is another.
        """
        text = self.sidecar_path.read_bytes()
        if hashlib.sha256(text).hexdigest() != self.raw_meta.hashes["sha256"]:
            raise DamagedShard(f"{self.sidecar_path} is not the sidecar in index.json; {self._way_out()}")
        return self._parse_sidecar(text)

    def _parse_sidecar(self, text: bytes) -> dict[str, Any]:
        """Returns a sidecar that says where `samples` samples lie within the tar: its hash may be made up too."""
        try:
            sidecar = parse_json(text)
            keys, slots = sidecar["keys"], _slots_of(sidecar)
            ends = map(sum, zip(slots.offsets, slots.sizes, strict=True))
            is_map = {len(keys), *map(len, slots)} == {self.samples} and all(isinstance(key, str) for key in keys)
            is_map = is_map and min(slots.offsets) >= 0 and min(slots.sizes) >= BLOCK_BYTES
            if not (is_map and max(ends) <= self.raw_data.bytes):
                raise ValueError("other samples than in index.json, or places outside the tar")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedShard(
                f"{self.sidecar_path} is no sidecar of a shard ({error}); {self._way_out(True)}"
            ) from None
        return sidecar

    def load(self) -> Slots:
        """Returns where the samples lie, and keeps it."""
        if self.slots is None:
            self.slots = _slots_of(self.sidecar())
        return self.slots

    def read_sample(self, file: OpenFile, idx: int) -> bytes:
        """Returns the tar blocks of sample `idx`, all of them, checked against their CRC-32."""
        slots = self.slots or self.load()
        size = slots.sizes[idx]
        data = os.pread(file.descriptor, size, slots.offsets[idx])
        if len(data) != size:
            raise self._damaged(idx, "cut short")
        if crc32(data) != slots.checksums[idx]:
            raise self._damaged(idx, "damaged (checksum)")
        return data

    def read_record(self, file: OpenFile, idx: int) -> dict[str, Any]:
        """Returns the record of sample `idx` without reading its images: it is the sample's first member."""
        slots = self.slots or self.load()
        offset, size = slots.offsets[idx], slots.sizes[idx]
        head = os.pread(file.descriptor, min(size, RECORD_GUESS_BYTES), offset)
        try:
            if (end := record_end(head)) > len(head):
                head = os.pread(file.descriptor, min(end, size), offset)  # a damaged size may be anything
            return parse_record(head[BLOCK_BYTES:end])
        except ValueError:
            self.read_sample(file, idx)  # says so if its bytes are others than once
            raise self._damaged(idx, "damaged (record)", is_as_written=True) from None

    def read_members(self, file: OpenFile, idx: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Returns the record of sample `idx`, and all its members by name, those of its images among them."""
        blocks = self.read_sample(file, idx)
        try:
            members = split_members(blocks)
            record = parse_record(members["json"])
            missing = {image["member"] for image in record["images"]} - members.keys()
        except (KeyError, ValueError) as error:
            raise self._damaged(idx, f"no sample of `make shards` ({error})", is_as_written=True) from None
        if missing:
            raise self._damaged(idx, f"without image {min(missing)!r} of its record", is_as_written=True)
        return record, members

    def get_sample_data(self, idx: int) -> bytes:
        """Returns the tar blocks of a sample; what streaming's own data set calls, which looks for no damage itself."""
        return self.read_sample(OpenFile(self.path), idx)

    def decode_sample(self, data: bytes) -> dict[str, bytes]:
        """Returns the members of a sample by name without the key: `json`, `jpg`, `0.png`, ..."""
        return split_members(data)

    def _damaged(self, idx: int, what: str, is_as_written: bool = False) -> DamagedShard:
        key = self.sidecar()["keys"][idx]
        return DamagedShard(f"{self.path}: sample {idx} (key {key}) is {what}; {self._way_out(is_as_written)}")

    def _way_out(self, is_as_written: bool = False) -> str:
        """Returns what to do; `is_as_written`: the bytes are those of the checksums, so they were never right."""
        if self.in_place:
            return "delete this tar and run `make shards` again"
        if is_as_written:
            return "its checksum is right, so it lies in the store like this; have the shards written again there"
        return "it was verified when it was fetched, so suspect the disk of this machine; delete it to fetch it anew"

    def _evict_raw(self) -> int:
        return 0 if self.in_place else super()._evict_raw()  # streaming tidies up where it lacks a sidecar


def _slots_of(sidecar: dict[str, Any]) -> Slots:
    columns = ("offsets", "q"), ("sizes", "q"), ("checksums", "I")
    return Slots(*(array(kind, sidecar[name]) for name, kind in columns))


def split_members(blocks: bytes) -> dict[str, bytes]:
    """Returns the content of each tar member by its name behind the key.

    Source: POSIX.1-1988 ustar: the name in bytes 0 to 100 of a header, the size as 11 octal digits from byte 124 on.

    Raises:
        ValueError: A header is not one, though the CRC-32 of the sample may be right.
    """
    members, start = {}, 0
    while start < len(blocks):
        name = blocks[start : start + 100].rstrip(b"\0").partition(b".")[2].decode()
        end = start + record_end(blocks[start : start + BLOCK_BYTES])
        if end > len(blocks):
            raise ValueError(f"member {name!r} ends behind its sample")
        members[name] = blocks[start + BLOCK_BYTES : end]
        start = end + -end % BLOCK_BYTES
    return members


def record_end(head: bytes) -> int:
    """Returns where the record of a sample ends, counted from the start of its header.

    Raises:
        ValueError: The header tells no size.
    """
    digits = head[124:135]
    if not digits.isdigit():  # `int` would take a sign
        raise ValueError(f"{digits!r} is no size of a tar member")
    return BLOCK_BYTES + int(digits, 8)


def parse_record(data: bytes) -> dict[str, Any]:
    """Returns the record of a sample from its JSON.

    Raises:
        ValueError: It is not a record as `data_prep.records` builds them.
    """
    record = parse_json(data)
    try:
        turns, images = record["conversations"], record["images"]
        texts = [text for turn in turns for text in (turn["from"], turn["value"])]
        texts += [text for image in images for text in (image["member"], image["path"])]
        if not all(isinstance(text, str) for text in [record["id"], *texts]):
            raise ValueError("a text is of another type")
        if not isinstance(record["source_index"], int):
            raise ValueError("source_index is no number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a record of `make shards` ({error})") from None
    return record
