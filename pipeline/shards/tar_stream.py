"""The tars that `make shards` wrote as a mosaicml-streaming `Stream`: an index, files to fetch, and a cache.

    TarStream(remote="s3://bucket/shards", local="/cache")                         as any `Stream`
    StreamingDataset(remote=..., local=..., stream_name="saisa-tar", ...)          by its name in streaming's registry

Training reads through `shard_set.ShardSet`, which is built on it. Of streaming this keeps the readers, the
downloaders with their retries, and the hashes of its index; what it adds is that no file has its name in the cache
before it is verified, and that one which is damaged there later is fetched again.
"""

import errno
import os
import threading
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.storage import CloudDownloader
from streaming.base.stream import Stream, streams_registry
from streaming.base.util import retry
from streaming.base.world import World

from common.files import open_location
from common.write_errors import NO_ROOM
from data_prep.listings import FORMAT, Index, Manifest, read_listings
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.tar_reader import DamagedShard, OpenFile, TarReader, open_whole

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_SECONDS = 60.0  # without a byte


class TarStream(Stream):
    """A shard set at `remote`, kept in a folder of its own under `local`; or, without `remote`, at `local` itself.

    Takes what `Stream` takes. The files of a set that is not remote are read where they are, and never removed.
    """

    def __init__(
        self,
        *,
        remote: str | None = None,
        local: str | None = None,
        download_retry: int = DOWNLOAD_ATTEMPTS,
        download_timeout: float = DOWNLOAD_TIMEOUT_SECONDS,
        cache_limit_bytes: int | None = None,
        **options: Any,
    ) -> None:
        remote = remote and remote.removeprefix("file://").rstrip("/")
        _check_endpoint(remote or "")
        options |= {"download_retry": download_retry, "download_timeout": download_timeout}
        try:
            super().__init__(remote=remote, local=local, **options)
        except ImportError as error:
            raise ValueError(f"{remote}: {error}; install what mosaicml-streaming needs for such URLs") from None
        self.root, self.cache_limit_bytes = Path(self.local), cache_limit_bytes
        self.cache: ShardCache | None = None
        self.manifest: Manifest | None = None

    def open(self) -> list[TarReader]:
        """Returns the readers of all shards that hold samples, from an index that is read anew at each call.

        Raises:
            ValueError: There are no finished shards, what lists them is damaged, or the limit of the cache is too low.
        """
        self.manifest, index = read_listings(open_location(self.remote or self.local))
        if self.remote:
            _check_limit(self.cache_limit_bytes, index)
            self.cache = ShardCache(self.root, self.manifest.fingerprint, self.cache_limit_bytes)
            self.local = str(self.cache.folder)
        return [TarReader(Path(self.local), shard, in_place=not self.cache) for shard in index.shards]

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Returns the same to streaming's own data set."""
        if self.split:
            raise ValueError(f"split={self.split!r}: shards have no splits; give the folder of each as `remote`")
        return [*self.open()]

    def get_index_size(self) -> int:
        """Returns what the index takes in the cache: it is not kept there, for it may change at the remote."""
        return 0

    def open_file(
        self, info: FileInfo, *, verify: bool = False, keep: Collection[Path] = (), wait: bool = True
    ) -> OpenFile:
        """Returns a file of the index, open; a remote one is fetched unless the cache has it whole.

        Args:
            info: The file.
            verify: Whether to go by its content, not its size alone.
            keep: Tars that must not make way for it.
            wait: Whether to wait for others who fetch it, and for room; False raises `Busy` or `NoRoom` instead.

        Raises:
            DamagedShard: It is not the file that the index lists, not even after it has been fetched again.
            OSError: It cannot be fetched or stored.
        """
        path = self.cache.path(info.basename) if self.cache else Path(self.local, info.basename)
        if not self.cache or not verify:
            try:
                return _marked(open_whole(path, info, verify), self.cache)
            except DamagedShard as problem:
                if not self.cache:
                    raise DamagedShard(f"{problem}; delete it and run `make shards` again") from None
        with self.cache.locked(info.basename, wait):  # whoever makes room leaves the file alone until it is open
            try:
                file = open_whole(path, info, verify)
            except DamagedShard:
                path.unlink(missing_ok=True)
                with self.cache.arriving(info.basename, info.bytes, keep, wait) as target:
                    self._fetch(info, target)
                file = OpenFile(path)
            return _marked(file, self.cache)

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Brings a file into the cache for streaming's own data set; returns by how many bytes that has grown."""
        path = Path(self.local, raw_info.basename)  # from an index whose names are checked
        num_bytes = path.stat().st_size if path.is_file() else 0
        self.open_file(raw_info)
        return raw_info.bytes - num_bytes

    def _fetch(self, info: FileInfo, target: Path) -> None:
        """Downloads a file and verifies it."""
        remote = f"{self.remote}/{info.basename}"
        downloader = _downloader(self.remote, os.getpid(), threading.get_ident())

        def attempt() -> None:
            target.unlink(missing_ok=True)
            downloader.download(remote, str(target), self.download_timeout)
            open_whole(target, info, verify=True)

        try:
            retry(clean_up_fn=downloader.clean_up, num_attempts=self.download_retry)(attempt)()
        except DamagedShard as problem:
            told = str(problem).replace(str(target), remote)
            raise DamagedShard(f"{told}; delete it and run `make shards` again, then start anew") from None
        except Exception as error:  # every kind of store has errors of its own
            number = getattr(error, "errno", None) or errno.EIO
            told = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
            if number in NO_ROOM:
                raise OSError(number, f"{info.basename} cannot be fetched into it: {told}", self.local) from error
            raise OSError(number, f"cannot be fetched into {self.local}: {told}", remote) from error


streams_registry.register(FORMAT, func=TarStream)


def _marked(file: OpenFile, cache: ShardCache | None) -> OpenFile:
    """Returns a file of the cache after telling those who make room that it is in use."""
    if cache:
        os.utime(file.descriptor)
    return file


@lru_cache(maxsize=64)
def _downloader(remote: str | None, pid: int, thread: int) -> CloudDownloader:
    """Returns streaming's downloader. Its clients survive no fork and, being reset by retries, are for one thread."""
    return CloudDownloader.get(remote)


def _check_endpoint(remote: str) -> None:
    """The downloader would heed S3_ENDPOINT_URL, which what reads the index does not know."""
    own, common = os.environ.get("S3_ENDPOINT_URL"), os.environ.get("AWS_ENDPOINT_URL")
    if remote.startswith("s3://") and own and own != common:
        raise ValueError(f"S3_ENDPOINT_URL={own} but AWS_ENDPOINT_URL={common}; set AWS_ENDPOINT_URL alone")


def _check_limit(limit_bytes: int | None, index: Index) -> None:
    two = 2 * max((shard.raw_data.bytes for shard in index.shards), default=0)
    if limit_bytes is not None and limit_bytes < two:
        raise ValueError(f"a cache limit of {limit_bytes:,} bytes does not hold two shards; it must be {two:,} or more")
