"""All samples of a shard set by number, from a folder or from a store: one `pread` each, no lock, no shared memory.

    shards = ShardSet("/data/shards")                                                   read in place
    shards = ShardSet("s3://bucket/shards", cache=Path("/nvme"), cache_limit_bytes=...) through a cache on this machine
    shards.members(17)["json"]

A remote shard is downloaded when it is first needed, or ahead of that by `prefetch`. Every sample is checked against
its CRC-32; a copy in the cache that fails is fetched again, anything else that is wrong is an error that says what to
do. Objects can be pickled, and shared with forked processes and threads.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.files import read_ranges
from data_prep.tar_writer import BLOCK_BYTES
from pipeline.shards.prefetch import Prefetcher
from pipeline.shards.tar_reader import (
    RECORD_GUESS_BYTES,
    DamagedShard,
    OpenFile,
    TarReader,
    parse_record,
    record_end,
)
from pipeline.shards.tar_stream import TarStream

MAX_OPEN_FILES = 64  # of shards in use: a file that is open takes disk space even when it has been evicted
RANGES_AT_A_TIME = 512  # of a remote shard whose records alone are read


class ShardSet:
    """All samples of a shard set, numbered from 0 in shard order."""

    def __init__(self, location: str | Path, cache: Path | None = None, cache_limit_bytes: int | None = None) -> None:
        """Reads the listings of the shard set, and of its shards nothing yet.

        Args:
            location: The folder or URL that `make shards` wrote. `file:///mnt/shards` is a mounted folder to read
                through the cache, any other folder is read in place.
            cache: The folder for shards from a URL. Sets get folders of their own there, which jobs may share.
            cache_limit_bytes: Most bytes of all shards in `cache`; None: as many as there are.

        Raises:
            ValueError: There are no finished shards, or the cache is missing or too small.
            OSError: They cannot be read.
        """
        self.location = str(location)
        is_remote = "://" in self.location
        if is_remote and cache is None:
            raise ValueError(f"{location}: shards from a URL need a folder to be cached in: data.cache, or --cache")
        options = {"remote": self.location, "cache_limit_bytes": cache_limit_bytes} if is_remote else {}
        self.stream = TarStream(local=str(cache if is_remote else location), **options)
        self.readers = self.stream.open()
        assert self.stream.manifest
        self.manifest = self.stream.manifest
        self.fingerprint = self.manifest.fingerprint
        self.shard_sizes = [len(reader) for reader in self.readers]
        self._ends = list(accumulate(self.shard_sizes))
        self._files: OrderedDict[int, OpenFile] = OrderedDict()  # its methods are atomic: no lock
        self._max_open = MAX_OPEN_FILES
        if is_remote and cache_limit_bytes:
            largest = max(reader.raw_data.bytes for reader in self.readers)
            self._max_open = min(MAX_OPEN_FILES, cache_limit_bytes // largest - 1)  # what is open is not evicted
        self._prefetcher = Prefetcher(self._fetch_ahead)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_prefetcher")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files=OrderedDict(), _prefetcher=Prefetcher(self._fetch_ahead))

    def record(self, number: int) -> dict[str, Any]:
        """Returns the record of a sample, images unread."""
        return self._read(TarReader.read_record, *self._locate(number))

    def members(self, number: int) -> dict[str, bytes]:
        """Returns every member of a sample by name: its record as `json` and its images.

        Raises:
            DamagedShard: The sample is damaged, in the cache even after its shard has been fetched again.
            OSError: Its shard cannot be fetched or stored.
        """
        return self.sample(number)[1]

    def sample(self, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Returns the record of a sample, and every member by name, those of the record's images among them.

        Raises:
            DamagedShard, OSError: As `members`.
        """
        return self._read(TarReader.read_members, *self._locate(number))

    def records(self, shard: int) -> Iterator[dict[str, Any]]:
        """Yields the records of a shard, images unread: a remote shard that is not in the cache is not downloaded."""
        reader = self.readers[shard]
        if self.stream.cache and not reader.path.is_file():
            self._load_slots(reader)
            yield from _remote_records(f"{self.location.rstrip('/')}/{reader.raw_data.basename}", reader)
        else:
            for idx in range(len(reader)):
                yield self._read(TarReader.read_record, shard, idx)

    def keys(self, shard: int) -> list[str]:
        """Returns the keys of a shard's samples."""
        self._load_slots(self.readers[shard])
        return self.readers[shard].sidecar()["keys"]

    def prefetch(self, shards: Sequence[int], threads: int = 4) -> None:
        """Starts to download shards that will be needed soon, the first soonest, and returns at once.

        Each call replaces the list of the call before. What does not fit into the cache beside the shards before it in
        the list, and those this process reads, is left for later calls. A download that fails is tried again, and its
        error raised, when the shard is read.
        """
        if self.stream.cache:
            self._prefetcher.want(shards, threads)

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.location} has no sample {number}, only {len(self)}")
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard] - self.shard_sizes[shard])

    def _read[T](self, read: Callable[[TarReader, OpenFile, int], T], shard: int, idx: int) -> T:
        """Returns what is read of a sample, if need be from a fresh copy of its shard."""
        reader, file = self.readers[shard], self._file(shard)
        try:
            return read(reader, file, idx)
        except DamagedShard:
            if not self.stream.cache:
                raise
        self._files.pop(shard, None)
        return read(reader, self._file(shard, verify=True), idx)

    def _file(self, shard: int, verify: bool = False) -> OpenFile:
        """Returns the tar of a shard, which stays open, and readable even if another process evicts it."""
        try:
            self._files.move_to_end(shard)
            return self._files[shard]
        except KeyError:
            reader = self.readers[shard]
            self._load_slots(reader)
            file = self.stream.open_file(reader.raw_data, verify=verify, keep=self._paths(self._files))
            self._files[shard] = file
            while len(self._files) > self._max_open:
                self._files.popitem(last=False)
            return file

    def _load_slots(self, reader: TarReader) -> None:
        if reader.slots is None:
            self.stream.open_file(reader.raw_meta, verify=True)
            reader.load()

    def _fetch_ahead(self, shard: int, before: Sequence[int]) -> None:
        """Brings a shard into the cache unless the shards in use, and those that are wanted before it, fill it."""
        if shard not in self._files:
            reader = self.readers[shard]
            self._load_slots(reader)
            self.stream.open_file(reader.raw_data, keep=self._paths([*self._files, *before]), wait=False)

    def _paths(self, shards: Sequence[int] | OrderedDict[int, OpenFile]) -> set[Path]:
        return {self.readers[shard].path for shard in tuple(shards)}


def _remote_records(url: str, reader: TarReader) -> Iterator[dict[str, Any]]:
    """Yields the records of a shard by ranged reads of its store, many at a time."""
    slots = reader.load()
    for first in range(0, len(reader), RANGES_AT_A_TIME):
        starts, sizes = (column[first : first + RANGES_AT_A_TIME] for column in (slots.offsets, slots.sizes))
        guesses = [(start, start + min(size, RECORD_GUESS_BYTES)) for start, size in zip(starts, sizes, strict=True)]
        heads = read_ranges(url, guesses)
        try:
            ends = [record_end(head) for head in heads]
            longer = [i for i, (head, end) in enumerate(zip(heads, ends, strict=True)) if len(head) < end]
            more = read_ranges(url, [(starts[i], starts[i] + min(ends[i], sizes[i])) for i in longer])
            whole = dict(zip(longer, more, strict=True))
            whole_heads = [whole.get(i, head) for i, head in enumerate(heads)]
            records = [parse_record(head[BLOCK_BYTES:end]) for head, end in zip(whole_heads, ends, strict=True)]
        except ValueError:
            raise DamagedShard(f"{url}: a record in samples {first} to {first + len(heads) - 1} is damaged") from None
        yield from records
