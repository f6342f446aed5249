"""Image files where they are: in a folder, or in a zip that is read in place.

The driver finds every image once (`open_images(...).find(path)`); a worker reads it by the entry alone (`read_image`),
so that the directory of a zip with half a million files is parsed once and not in every worker.
"""

import errno
import io
import os
import posixpath
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from data_prep.records import Refused

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
"""Where they differ from the lower-case format. MPO: what Pillow calls a JPEG with more pictures behind the first."""
MAX_PIXELS = 178_956_970
"""Source: the size at which Pillow itself raises DecompressionBombError (twice `Image.MAX_IMAGE_PIXELS`)."""


class ZipSlot(NamedTuple):
    """Where a member's bytes lie in its zip file."""

    header_offset: int
    num_stored_bytes: int
    method: int
    crc: int


class ImageEntry(NamedTuple):
    """An image that was found: all a worker needs to read it."""

    path: str
    file: str
    num_bytes: int
    modified_ns: int
    slot: ZipSlot | None = None


class ImageInfo(NamedTuple):
    """What a full decode has shown an image to be."""

    format: str
    width: int
    height: int

    @property
    def extension(self) -> str:
        """The file name extension that tells the format, whatever the file was called."""
        return EXTENSIONS.get(self.format, self.format.lower())


class FolderImages:
    """Images in a folder."""

    def __init__(self, root: Path):
        """`root` becomes absolute, because workers have another current folder."""
        self.root = str(root.resolve())

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of a regular file under the folder."""
        file = os.path.join(self.root, path)
        try:
            status = os.stat(file)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return None
            raise
        return ImageEntry(path, file, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


class ZipImages:
    """Images in a zip file."""

    def __init__(self, root: Path):
        """Reads the zip's directory, once.

        Raises:
            ValueError: The directory is damaged.
        """
        self.root = str(root.resolve())
        try:
            with zipfile.ZipFile(root) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{root} is not a readable zip file: {error}") from None

    def find(self, path: str) -> ImageEntry | None:
        """Returns the entry of a member of this exact name."""
        info = self.members.get(posixpath.normpath(path))
        if info is None or info.is_dir():
            return None
        method = -1 if info.flag_bits & 1 else info.compress_type  # -1: encrypted
        slot = ZipSlot(info.header_offset, info.compress_size, method, info.CRC)
        return ImageEntry(path, self.root, info.file_size, 0, slot)


ImageDirectory = FolderImages | ZipImages


def open_images(root: Path) -> ImageDirectory:
    """Returns the images under a folder or in a zip file.

    Raises:
        ValueError: `root` is neither.
    """
    if root.is_dir():
        return FolderImages(root)
    if root.is_file() and zipfile.is_zipfile(root):
        return ZipImages(root)
    raise ValueError(f"--images {root} is {'not a zip file' if root.exists() else 'not there'}; give a folder or a zip")


def read_image(entry: ImageEntry) -> bytes:
    """Returns the bytes of an image as they are in its source.

    Raises:
        Refused: The zip member is damaged, encrypted or compressed in an unusual way.
        OSError, ValueError: The file is gone or has changed since it was found.
    """
    with open(entry.file, "rb") as file:
        data = file.read() if entry.slot is None else _read_member(file, entry, entry.slot)
    if len(data) != entry.num_bytes:
        raise ValueError(f"{entry.file} changed while it was being sharded; run again with a new --out")
    return data


def _read_member(file: io.BufferedReader, entry: ImageEntry, slot: ZipSlot) -> bytes:
    """Source: PKWARE APPNOTE 4.3.7, the local file header: 30 bytes, then name and extra field, then the data."""
    file.seek(slot.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise Refused("zip_member", "zip member has no header where the zip's directory says", entry.path)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    stored = file.read(slot.num_stored_bytes)
    try:
        if slot.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if slot.method < 0 else f"compressed by method {slot.method}"
            raise Refused("zip_member", f"zip member is {kind}; use stored or deflated members", entry.path)
        data = stored if slot.method == zipfile.ZIP_STORED else _inflate(stored, entry.num_bytes)
    except zlib.error as error:
        raise Refused("zip_member", f"zip member is damaged: {error}", entry.path) from None
    if len(data) != entry.num_bytes or zlib.crc32(data) != slot.crc:
        raise Refused("zip_member", "zip member is damaged: its checksum differs", entry.path)
    return data


def _inflate(stored: bytes, num_bytes: int) -> bytes:
    """Returns at most one byte more than the zip's directory promises, whatever the member would swell to."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, num_bytes + 1)


def check_image(data: bytes, path: str) -> ImageInfo:
    """Returns what an image is, after decoding it in full (the first picture of an animation) as training will.

    One decode on one object decides: after a failed `load()` Pillow hands out the partial pixels without an error.

    Raises:
        Refused: It does not decode, is cut short, is empty, or has more than `MAX_PIXELS` pixels.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "something told Pillow to fill truncated images with gray"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes and odd metadata: the pixels decide
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                image.load()
                if image.mode != "RGB":
                    image.convert("RGB")
                return ImageInfo(str(image.format), image.width, image.height)
    except UnidentifiedImageError:  # its own message holds a memory address
        raise Refused("not_an_image", f"not an image that can be read ({_start(data)})", path) from None
    except Image.DecompressionBombError:
        raise Refused("image_too_large", f"more than {MAX_PIXELS} pixels", path) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise Refused("image_damaged", f"image does not decode: {type(error).__name__}: {error}", path) from None


def _start(data: bytes) -> str:
    return f"{len(data)} bytes, beginning {ascii(data[:16])[1:]}" if data else "an empty file"
