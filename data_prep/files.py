"""Files that are either whole or not there, in a folder or in an object store.

A place is a local path or a URL that fsspec knows (`s3://bucket/shards`, `gs://...`, `https://...`). Locally a file is
written under another name, synced and renamed; in a store it is written here first and then put, which stores do whole
or not at all.
"""

import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from upath import UPath

type Place = Path | UPath
"""A local path, or one in a store; both have the methods of `pathlib.Path`."""
STORE_OPTIONS = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}}},
    "gs": {"use_listings_cache": False},
}
"""Other machines write to the same place, so what was listed once is not kept; a busy store is asked again."""


def open_place(place: str | Path) -> Place:
    """Returns the path of a local file or folder, or of a URL; a local one is absolute.

    Raises:
        ValueError: The URL's kind is not installed, or its store cannot be reached.
    """
    try:
        if "://" not in (local := str(place).removeprefix("file://")):
            return Path(local).absolute()
        path = _open_url(str(place))
        path.exists()
    except Exception as error:  # every kind of store has errors of its own
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{place} cannot be reached: {problem[0]}") from None
    return path


def _open_url(url: str) -> UPath:
    return UPath(url, **STORE_OPTIONS.get(url.partition("://")[0], {}))


@contextmanager
def whole_file(path: Place) -> Iterator[BinaryIO]:
    """Yields a file to write that takes the name `path` only once all its bytes are on the disk or in the store."""
    if isinstance(path, Path):
        with _whole_local_file(path) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(prefix="saisa-") as file:
        yield file  # type: ignore
        file.flush()
        path.fs.put_file(file.name, path.path)
        num_bytes = os.path.getsize(file.name)
    if (size := path.fs.info(path.path)["size"]) != num_bytes:
        raise OSError(f"{path}: {num_bytes} bytes were put but {size} arrived")


@contextmanager
def _whole_local_file(path: Path) -> Iterator[BinaryIO]:
    """The name in between is unique, so that a worker which outlives its driver cannot spoil its successor's file."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # "No space left on device" alone does not say where
        raise


def write_whole(path: Place, data: bytes) -> None:
    """Writes a file that is either whole or not there."""
    with whole_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sizes(folder: Place) -> dict[str, int]:
    """Returns the bytes of each file in a folder by its name, at the price of one listing; empty without a folder."""
    try:
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        listed = folder.fs.ls(folder.path, detail=True)
        return {os.path.basename(found["name"]): found["size"] for found in listed if found["type"] == "file"}
    except FileNotFoundError:
        return {}


def remove_parts(folder: Place) -> None:
    """Removes what interrupted writers left behind; a store holds no such thing."""
    if isinstance(folder, Path):
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Place) -> Iterator[None]:
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
        except BlockingIOError:
            raise ValueError(f"another run is writing to {folder}; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def local_copy(path: Place) -> Iterator[Path]:
    """Yields a local file of the same content: the file itself, or a copy that lasts as long as the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="saisa-") as folder:
        copy = Path(folder, path.name)
        path.fs.get_file(path.path, str(copy))
        yield copy


def read_range(place: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Returns `num_bytes` of a file from `offset` on, or as many as there are; None means all."""
    if "://" not in place:
        with open(place, "rb") as file:
            file.seek(offset)
            return file.read(-1 if num_bytes is None else num_bytes)
    path = _open_url(place)
    end = None if num_bytes is None else offset + num_bytes
    data: Any = path.fs.cat_file(path.path, start=offset or None, end=end)
    return data
