"""Files that are either whole or not there, in a folder or in an object store.

A location is a local path or a URL that fsspec knows (`s3://bucket/shards`, `gs://...`, `https://...`). Locally a file
is written under another name, synced and renamed; in a store it is written here first and then put, which stores do
whole or not at all.
"""

import errno
import fcntl
import io
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from common.paths import check_regular
from common.write_errors import NO_ROOM, os_error_in

if TYPE_CHECKING:  # whoever has local files alone needs no package for stores
    from upath import UPath

type Location = Path | UPath
"""A local path, or one in a store; both have the methods of `pathlib.Path`."""
ATTEMPTS = 8  # at each request to S3 during a run, with longer and longer pauses: a busy store is asked again
FIRST_ATTEMPTS = 3  # before a run has begun: a wrong address should not take minutes to be told


def open_location(location: str | Path) -> Location:
    """Returns the path of a local file or folder, or of a URL; a local one is absolute.

    Raises:
        ValueError: The URL's kind is not installed, its store cannot be reached, or its bucket is not there.
    """
    if "://" not in (local := str(location).removeprefix("file://")):
        return Path(local).absolute()
    from upath.implementations.cloud import AzurePath, GCSPath, S3Path

    try:
        probe = _open_url(str(location), FIRST_ATTEMPTS)
        if isinstance(probe, Path):
            raise ValueError("there is no such kind of URL")  # but to UPath it may be a local path
        fs: Any = probe.fs
        fs.retries = 1  # of s3fs, which would ask five times, each time as often as it is told to
        if not probe.exists() and isinstance(probe, S3Path | GCSPath | AzurePath):
            fs.info(probe.drive)  # its bucket
        return _open_url(str(location))
    except FileNotFoundError:
        raise ValueError(f"{location} cannot be reached: there is no bucket of this name") from None
    except Exception as error:  # every kind of store has errors of its own
        raise ValueError(f"{location} cannot be reached: {_problem(error)}") from None


def _open_url(url: str, attempts: int = ATTEMPTS) -> "UPath":
    """Other machines write to the same location, so what was listed once is not kept."""
    from upath import UPath

    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://", "gs://", "gcs://")):
        options["use_listings_cache"] = False
    if url.startswith("s3"):
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": attempts}}
    return UPath(url, **options)


@contextmanager
def named_errors(location: Location | str) -> Iterator[None]:
    """Lets every `OSError` name its location, and makes one of what a library or a store's client raises."""
    try:
        yield
    except OSError as error:  # "No space left on device" alone does not say where, nor does "Forbidden"
        if error.filename is not None:
            raise
        known = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
        number = error.errno or known.get(type(error), errno.EIO)
        raise OSError(number, _problem(error), str(location)) from error
    except (ValueError, LookupError, TypeError, AssertionError):
        raise  # about what was read, not about reading it
    except Exception as error:
        if (found := os_error_in(error)) is not None:  # a library's own
            raise OSError(found.errno, found.strerror, str(location)) from error
        if "://" not in str(location):
            raise
        raise OSError(errno.EIO, _problem(error), str(location)) from error


def _problem(error: Exception) -> str:
    """Returns one line."""
    told = getattr(error, "strerror", None) or str(error)  # the first is without Python's "[Errno 2]"
    return next(iter(told.strip().splitlines()), type(error).__name__)


@contextmanager
def whole_file(path: Location) -> Iterator[BinaryIO]:
    """Yields a file to write that takes the name `path` only once all its bytes are on the disk or in the store."""
    if isinstance(path, Path):
        with _whole_local_file(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:  # without a name: nothing is left of it when this process is killed
        with named_errors(tempfile.gettempdir()):
            yield file  # type: ignore
            num_bytes = file.tell()
            file.seek(0)
        with named_errors(path):
            path.fs.put_file(f"/dev/fd/{file.fileno()}", path.path)
            if (size := path.fs.info(path.path)["size"]) != num_bytes:
                raise OSError(f"{num_bytes} bytes were put but {size} arrived")


@contextmanager
def _whole_local_file(path: Path) -> Iterator[BinaryIO]:
    """The name in between is unique, so that a worker which outlives its driver cannot spoil its successor's file."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with named_errors(path):
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Location, data: bytes) -> None:
    """Writes a file that is either whole or not there."""
    with whole_file(path) as file:
        file.write(data)


def read_whole(path: Location, max_bytes: int | None = None) -> bytes:
    """Returns the bytes of a file.

    Raises:
        ValueError: It is none, or has more than `max_bytes`.
    """
    check_regular(path)
    with named_errors(path):
        if max_bytes is not None:
            size = path.stat().st_size if isinstance(path, Path) else path.fs.info(path.path).get("size") or 0
            if size > max_bytes:
                raise ValueError(f"{size:,} bytes, and {max_bytes:,} are the most that such a file has")
        return path.read_bytes()


@contextmanager
def open_file(path: Location) -> Iterator[BinaryIO]:
    """Yields a file whose reads are short at its end alone; some web servers' are short where a packet ends.

    Raises:
        ValueError: It is a pipe or a device.
    """
    check_regular(path)
    with named_errors(path), path.open("rb") as file:
        yield file if isinstance(path, Path) else io.BufferedReader(file)  # type: ignore


def remove(path: Location) -> None:
    """Removes a file, if it is there."""
    with named_errors(path):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sizes(folder: Location) -> dict[str, int]:
    """Returns the bytes of each file in a folder by its name, at the price of one listing; empty without a folder."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        with named_errors(folder):
            listed = folder.fs.ls(folder.path, detail=True)
        return {os.path.basename(found["name"]): found["size"] for found in listed if found["type"] == "file"}
    except FileNotFoundError:
        return {}


def remove_parts(folder: Location) -> None:
    """Removes what interrupted writers left behind; a store holds no such thing."""
    if isinstance(folder, Path):
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Location) -> Iterator[None]:
    """Keeps other runs out of a folder while the block runs, and creates it; ends with this process at the latest.

    Raises:
        ValueError: Another run holds the folder.
    """
    if not isinstance(folder, Path):
        yield  # stores have no locks
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with lock.open("w") as file:  # a file and not the folder itself, for NFS
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # its holder has just removed it, and a third run may hold the next
        except BlockingIOError:
            raise ValueError(f"another run is writing to {folder}; wait for it or stop it") from None
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked ({error.strerror}); mount it with flock", str(lock)) from None
        try:
            yield
        finally:
            remove_parts(folder)  # of workers that were stopped
            lock.unlink(missing_ok=True)


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """Yields a local file of the same content: the file itself, or a copy that lasts as long as the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="saisa-") as folder:
        copy = Path(folder, path.name)
        with named_errors(path):
            try:
                path.fs.get_file(path.path, str(copy))
            except OSError as error:
                if error.errno in NO_ROOM:  # here and not in the store
                    raise OSError(error.errno, error.strerror, folder) from error
                raise
        yield copy


def read_range(location: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Returns `num_bytes` of a file from `offset` on, or as many as there are; None means all."""
    if "://" not in location:
        with open(location, "rb") as file:
            file.seek(offset)
            return file.read(-1 if num_bytes is None else num_bytes)
    path = _open_url(location)
    end = None if num_bytes is None else offset + num_bytes
    with named_errors(location):
        data: Any = path.fs.cat_file(path.path, start=offset or None, end=end)
    return data


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes `[start, end)` of a file in a store for each range, many at a time."""
    path, (starts, ends) = _open_url(url), zip(*ranges, strict=True) if ranges else ((), ())
    with named_errors(url):
        return path.fs.cat_ranges([path.path] * len(ranges), list(starts), list(ends), on_error="raise")
