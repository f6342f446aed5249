"""A folder of downloaded shards that all processes of a machine share, under a limit on its size.

    <cache>/.lock                                     held by who makes room
    <cache>/<fingerprint>/shard-000000.tar            whole: a file takes its name only once it is verified
    <cache>/<fingerprint>/shard-000001.tar.123.part/  on its way; counts with the 123 bytes it will have
    <cache>/<fingerprint>/.locks/shard-000001.tar     held by who fetches, verifies or removes that file

A shard set has a folder of its own, named by its fingerprint, so jobs with the same shards share them and others never
collide. Locks are the kernel's and end with their process; what a killed one leaves is removed by the next to pass. A
tar that makes way while another process reads it stays readable to that process, and on the disk, until it is closed
there; files with names never exceed the limit.

A listing comes from outside, and whoever shares a cache may leave links in it, so every path is checked before it is
read, written, locked or removed: it is the one above, and no link leads away from it (`within`).
"""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.paths import within

WAIT_SECONDS = 1800.0  # for a shard that another process fetches: a healthy download takes less
POLL_SECONDS = 0.05
SETS = "[0-9a-f]" * 64  # a glob of fingerprints: whatever else is in a cache folder is not ours to remove


class NoRoom(OSError):
    """The cache holds nothing that could make way."""


class Busy(OSError):
    """Somebody else has a file in hand."""


class ShardCache:
    """The files of one shard set. Counted are the tars; their sidecars take a thousandth of that and stay."""

    def __init__(self, root: Path, name: str, limit_bytes: int | None) -> None:
        """Raises `ValueError` where the folder of the set is not in the cache."""
        self.root, self.folder, self.limit_bytes = root, within(root, name), limit_bytes

    def path(self, name: str) -> Path:
        """Returns where a file of the set is, or would be.

        Raises:
            ValueError: That is not in the folder of the set.
        """
        return within(self.root, self.folder.name, name)

    def locked(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        """Keeps all others, threads and processes, from fetching, verifying or removing a file.

        Raises:
            Busy: Another has it in hand, and `wait` is False.
            ValueError: Another has had it in hand for `WAIT_SECONDS`.
        """
        return _locked(self.root, _lock_of(self.path(name)), wait)

    @contextmanager
    def arriving(self, name: str, num_bytes: int, keep: Collection[Path], wait: bool) -> Iterator[Path]:
        """Yields where to put a file, which takes its name when the block ends well; the caller holds its lock.

        Args:
            name: The file's name, of which nothing is in the folder yet.
            num_bytes: How large it will be.
            keep: Tars that must not make way for it.
            wait: Whether to wait for room while other downloads are on their way.

        Raises:
            NoRoom: Nothing can make way, and `wait` is False.
            ValueError: There has been no room for `WAIT_SECONDS`.
        """
        target = self.path(name)
        for left in self.folder.glob(f"{name}.*.part"):
            _remove(left)
        part = self.path(f"{name}.{num_bytes}.part")
        if self.limit_bytes is None or not name.endswith(".tar"):
            part.mkdir()
        else:
            self._reserve(part, num_bytes, keep, wait, self.limit_bytes)
        try:
            yield part / name
            os.replace(part / name, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _reserve(self, part: Path, num_bytes: int, keep: Collection[Path], wait: bool, limit: int) -> None:
        """Creates the folder `part`, which counts as `num_bytes`, once that many fit under the limit."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with _locked(self.root, self.root / ".lock"):
                if make_room(self.root, limit - num_bytes, keep):
                    part.mkdir()
                    return
            if not wait:
                raise NoRoom(f"{self.root} is full of shards that are needed sooner")
            if time.monotonic() > deadline:
                raise ValueError(f"{self.root}: no room for {part.name} under the limit of {limit:,} bytes; raise it")
            time.sleep(POLL_SECONDS)


def make_room(root: Path, max_bytes: int, keep: Collection[Path]) -> bool:
    """Removes the least recently used tars of a cache until the rest takes at most `max_bytes`.

    Returns whether it does; where it cannot, nothing is removed. The caller holds the cache's lock.
    """
    num_coming = _bytes_on_their_way(root)  # first: what arrives meanwhile is counted twice rather than not at all
    tars = sorted(_sizes_by_age(root))
    excess = sum(num_bytes for _, num_bytes, _ in tars) + num_coming - max_bytes
    victims = []
    for _, num_bytes, path in tars:
        if excess > 0 and path not in keep:
            victims.append(path)
            excess -= num_bytes
    return excess <= 0 and all([_try_remove(root, path) for path in victims])


def _files(root: Path, pattern: str) -> Iterator[Path]:
    """Yields what is in the folders of all sets, folders that are links left out: what they hold is not the cache's."""
    for folder in root.glob(SETS):
        if not folder.is_symlink():
            yield from folder.glob(pattern)


def _sizes_by_age(root: Path) -> Iterator[tuple[int, int, Path]]:
    for path in _files(root, "shard-*.tar"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # removed by who found it damaged
        yield status.st_mtime_ns, status.st_size, path


def _bytes_on_their_way(root: Path) -> int:
    """Returns the bytes that downloads in progress will take, after removing what killed processes left of theirs."""
    total = 0
    for part in _files(root, "shard-*.tar.*.part"):
        name, num_bytes, _ = part.name.rsplit(".", 2)
        if not _try_remove(root, part, part.with_name(name)):
            total += int(num_bytes)
    return total


def _try_remove(root: Path, path: Path, locked_as: Path | None = None) -> bool:
    """Removes a file or folder of the cache unless somebody holds its lock; returns whether it is gone."""
    try:
        with _locked(root, _lock_of(locked_as or path), wait=False):
            _remove(path)
    except Busy:
        return False
    return True


def _remove(path: Path) -> None:
    """Removes a file, a folder, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.parent / ".locks" / path.name


@contextmanager
def _locked(root: Path, lock: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock; every call has its own, so that threads exclude one another too. Creates the folders it is in."""
    within(root, *lock.relative_to(root).parts)
    try:
        held = FileLock(lock, timeout=WAIT_SECONDS if wait else 0, poll_interval=POLL_SECONDS).acquire()
    except Timeout:
        if not wait:
            raise Busy(f"{lock} is held") from None
        raise ValueError(
            f"another process has held {lock} for {WAIT_SECONDS / 60:.0f} minutes; if it hangs, stop it"
        ) from None
    with held:
        yield
