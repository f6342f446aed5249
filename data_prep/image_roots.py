"""Where images are: in folders, in zips that are read in location, in object stores, under one root or several.

    --images /data/llava-images                     every path
    --images coco=s3://data/train2017.zip           coco/train2017/1.jpg is train2017/1.jpg in that zip
    --images vg=images.zip --images vg=images2.zip  vg/... in the first that has it

The driver finds every image once (`open_images(...).find(path)`); a worker reads it by the entry alone (`read_image`),
so that the directory of a zip with half a million files is parsed once and not in every worker.
"""

import errno
import os
import posixpath
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from upath import UPath

from common.console import UsageError
from common.files import Location, named_errors, open_location, read_range
from common.images import MAX_IMAGE_BYTES
from data_prep.row_shapes import Refused
from data_prep.zip_images import ZipDirectory, ZipSlot, read_member

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "avif", "jp2")
REFUSED_ERRORS = (errno.ELOOP, errno.EACCES, errno.EPERM)
NAMED_ROOT = re.compile(r"([\w-]+(?:/[\w-]+)*)=(.+)", re.DOTALL)


class ImageEntry(NamedTuple):
    """An image that was found: all a worker needs to read it.

    `path` is what the row says, `file` the file or URL that holds the bytes. `version` is another one when the file has
    been written again. `found_as` is the path it was found at, where that has another extension or is written in the
    other Unicode form, and `offset` where it begins in a file that holds others too.
    """

    path: str
    file: str
    num_bytes: int
    version: int
    slot: ZipSlot | None = None
    found_as: str | None = None
    offset: int | None = None


class FolderImages:
    """Images in a local folder. Their names are UTF-8 whatever the locale, and so are those of their entries."""

    def __init__(self, root: Path):
        self.root = os.fsencode(root).decode(errors="surrogateescape")

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of a regular file under the folder.

        Raises:
            Refused: It is not for this user, or a loop of links.
        """
        file = os.path.join(self.root, path)
        try:
            status = os.stat(file.encode(errors="surrogateescape"))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return None
            if error.errno in REFUSED_ERRORS:
                raise _unreadable(path, error) from None
            raise
        return ImageEntry(path, file, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _unreadable(path: str, error: OSError) -> Refused:
    return Refused("image_unreadable", f"image cannot be read: {error.strerror}", path)


class StoreImages:
    """Images under the URL of an object store, which is listed once."""

    def __init__(self, root: UPath):
        """Raises `ValueError` where nothing can be listed."""
        with named_errors(root):
            listed: Any = root.fs.find(root.path, detail=True)
        if not listed:
            raise ValueError(f"--images {root} lists no files; give a URL that can be listed, or that of a zip")
        self.root, start = str(root).rstrip("/"), len(root.path.rstrip("/")) + 1
        self.files = {name[start:]: (info["size"], _version(info)) for name, info in listed.items()}

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of an object under the URL."""
        found = self.files.get(path)
        return found and ImageEntry(path, f"{self.root}/{path}", *found)


def _version(info: dict) -> int:
    """Returns a number for what a store says identifies the content of an object."""
    told = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("LastModified") or info.get("mtime")
    return zlib.crc32(str(told).encode())


class ZipImages:
    """Images in a zip file, local or at a URL."""

    def __init__(self, root: Location):
        """Raises `ValueError` where there is no zip file with a readable directory."""
        self.root, self.directory = str(root), ZipDirectory(root)

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of a member of this name; macOS writes UTF-8 and does not say so."""
        slot = self.directory.find(path)
        if slot is None and not path.isascii():
            slot = self.directory.find(path.encode().decode("cp437"))
        return slot and ImageEntry(path, self.root, slot.num_bytes, 0, slot)


class ImageRoots:
    """Several roots, asked in the order they were given; one with a name answers for paths that begin with it."""

    def __init__(self, roots: Sequence[tuple[str, FolderImages | StoreImages | ZipImages]]):
        self.roots = roots

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of an image by the path in its row, or of the like if there is no such file (`_spellings`).

        Raises:
            Refused: It is there, but cannot be read, or is larger than any image.
        """
        plain = posixpath.normpath(path)
        for candidate in _spellings(plain):
            for name, root in self.roots:
                if not candidate.startswith(name):
                    continue
                if entry := root.find(candidate[len(name) :]):
                    if entry.num_bytes > MAX_IMAGE_BYTES:
                        told = f"a file of {entry.num_bytes:,} bytes, more than {MAX_IMAGE_BYTES:,}"
                        raise Refused("image_too_large", told, path)
                    same = candidate == path == entry.path  # as nearly always: spare the copy
                    other = None if candidate == plain else candidate
                    return entry if same else entry._replace(path=path, found_as=other)
        return None


def _spellings(path: str) -> Iterator[str]:
    """Yields the path itself, in the other Unicode forms, and then each with all other extensions that images have.

    What follows a dot is an extension only if images have it: `2401.00001` is a name.
    """
    forms = [*dict.fromkeys([path, normalize("NFC", path), normalize("NFD", path)])]
    yield from forms
    extension = posixpath.splitext(path)[1]
    if extension and extension[1:].lower() not in EXTENSIONS:
        return
    for form in forms:
        stem, _ = posixpath.splitext(form)
        for known in EXTENSIONS:
            yield from (f"{stem}.{spelled}" for spelled in (known, known.upper()) if f"{stem}.{spelled}" != form)


def open_images(locations: Sequence[str]) -> ImageRoots:
    """Returns the images of one or several roots, each a folder, a zip or a URL, with or without `name=` before it.

    Raises:
        ValueError: A root is none of these.
        UsageError: There is no root.
    """
    if not locations:
        raise UsageError("--images is missing; give a folder, a zip or a URL")
    roots = []
    for spelled in locations:
        name, location = split_name(spelled)
        roots.append((name, _open_root(open_location(location))))
    return ImageRoots(roots)


def split_name(spelled: str) -> tuple[str, str]:
    """Returns the prefix of paths that a root answers for (empty for all) and its location.

    Raises:
        UsageError: It may be a location with `=` in it as well as a named one.
    """
    named = NAMED_ROOT.fullmatch(spelled)
    if named is None:
        return "", spelled
    if os.path.exists(spelled):  # as Hive calls its folders, run=3
        if os.path.exists(named[2]):
            raise UsageError(
                f"--images {spelled} is a folder or file here, and so is {named[2]}; write ./{spelled} for the first, "
                f"or {named[1]}=./{named[2]} for the root named {named[1]}"
            )
        return "", spelled
    return f"{named[1]}/", named[2]


def _open_root(root: Location) -> FolderImages | StoreImages | ZipImages:
    if root.is_file():
        return ZipImages(root)
    if not isinstance(root, Path):
        return StoreImages(root)
    if root.is_dir():
        return FolderImages(root)
    raise ValueError(f"--images {root} is not there; give a folder or a zip")


def read_image(entry: ImageEntry) -> bytes:
    """Returns the bytes of an image as they are in its source.

    Raises:
        Refused: The file is not for this user, or the zip member is damaged, encrypted or compressed in an unusual way.
        OSError, ValueError: The file is gone or has changed since it was found.
    """
    if entry.slot:
        data = read_member(entry.file, entry.path, entry.slot)
    elif entry.offset is not None:
        data = read_range(entry.file, entry.offset, entry.num_bytes)
    elif "://" not in entry.file:
        data = _read_local(entry)
    else:  # a byte more than it had, to see that it has not grown; S3 would be asked for the size of a whole file first
        data = read_range(entry.file, 0, entry.num_bytes + 1 if entry.num_bytes else None)
    if len(data) != entry.num_bytes:
        raise ValueError(f"{entry.file} changed while it was being sharded; run again with a new --out")
    return data


def _read_local(entry: ImageEntry) -> bytes:
    """Returns the bytes of a file, one more than it had if it has grown.

    An empty file is not opened. Links may lead to those that the kernel makes up (in /proc, /sys): they say that they
    are empty, or of another size than they have, and some of them wait when they are read.
    """
    if not entry.num_bytes:
        return b""
    try:
        with open(entry.file.encode(errors="surrogateescape"), "rb") as file:
            data = file.read(entry.num_bytes + 1)
            if len(data) != entry.num_bytes == os.fstat(file.fileno()).st_size:
                raise Refused("image_unreadable", "image cannot be read: its size is not that of its bytes", entry.path)
            return data
    except OSError as error:
        if error.errno in REFUSED_ERRORS:
            raise _unreadable(entry.path, error) from None
        raise
