"""A zip of images that is read in place, here or at a URL: its directory, and the bytes of one member.

The directory stays in memory as it stands in the file, with an index of 12 bytes a member: the CRC-32 of every name,
sorted, and where its header is. A name is looked up by bisection and then compared in full. That makes some 90 bytes a
member, where Python's `zipfile` keeps an object of about 475.

Names, duplicates (the last counts) and bytes in front of the zip are understood as `zipfile` understands them.
Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end), 4.5.3 and
4.6.9 (zip64 and Unicode names in the extra field).
"""

import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.files import Location, named_errors, read_range
from data_prep.row_shapes import Refused

HEADER = struct.Struct("<4s4xHH4xLLLHHH8xL")  # of a member, in the directory
END = struct.Struct("<4s8xLL2x")  # a comment of up to 65,535 bytes follows
END64 = struct.Struct("<4s36xQQ20x")  # with the locator of 20 bytes that stands between it and the other end
MAX_END_BYTES = END64.size + END.size + 65535
IN_EXTRA_FIELD = 0xFFFFFFFF  # for a number that takes 64 bits
ZIP64, UNICODE_NAME = 0x0001, 0x7075  # kinds of extra field
ENCRYPTED, UTF8_NAME = 0x0001, 0x0800  # flags
LOCAL_HEADER_BYTES = 30
ENCRYPTED_METHOD, DAMAGED_METHOD = -1, -2
UNREADABLE = {
    ENCRYPTED_METHOD: "is encrypted; use stored or deflated members",
    DAMAGED_METHOD: "is damaged: what the zip's directory says of it cannot be",
}
DEFLATE_RATIO = 1032
"""Source: zlib's technical details: no deflated data become larger than this many times their size."""
SLACK_BYTES = 256  # read along with a member's header; the extra field of most zips is far shorter


class ZipSlot(NamedTuple):
    """Where a member's bytes lie in its zip file, and how to know them; `method` may also be one of `UNREADABLE`."""

    header_offset: int
    num_stored_bytes: int
    num_bytes: int
    method: int
    crc: int


class ZipDirectory:
    """The members of a zip file by name."""

    def __init__(self, location: Location):
        """Reads the zip's directory, in two requests.

        Raises:
            ValueError: It is not a zip file, or its directory is damaged.
        """
        try:
            start, num_bytes, self.num_bytes_before, self.file_bytes = _find_directory(location)
            self.directory = read_range(str(location), start, num_bytes) if num_bytes else b""
            self.crcs, self.header_offsets = self._index()
        except (zipfile.BadZipFile, struct.error) as error:
            raise ValueError(
                f"--images {location} is not a readable zip file ({error}); give a folder or a zip"
            ) from None

    def find(self, name: str) -> ZipSlot | None:
        """Returns where the member of this exact name lies; a directory is no member."""
        wanted = name.encode()
        crc = np.uint32(zlib.crc32(wanted))  # of the index's own type, or numpy would convert all of it
        first, end = self.crcs.searchsorted(crc, "left"), self.crcs.searchsorted(crc, "right")
        for header_offset in self.header_offsets[first:end][::-1].tolist():
            found, slot, _ = self._member(header_offset)
            if found == wanted:
                return slot
        return None

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint32[members] and uint64[members]: the CRC-32 of each name, sorted, and its header's offset."""
        crcs, header_offsets, header_offset = array("I"), array("Q"), 0
        while header_offset < len(self.directory):
            name, _, following = self._member(header_offset)
            if not name.endswith(b"/"):
                crcs.append(zlib.crc32(name))
                header_offsets.append(header_offset)
            header_offset = following
        if header_offset > len(self.directory):
            raise zipfile.BadZipFile("its directory is cut short")
        order = np.argsort(np.asarray(crcs), kind="stable")  # of one name, the last stays last
        return np.asarray(crcs)[order], np.asarray(header_offsets)[order]

    def _member(self, header_offset: int) -> tuple[bytes, ZipSlot, int]:
        """Returns the name (UTF-8) of the member whose header is here, where it lies, and the offset of the next."""
        fields = HEADER.unpack_from(self.directory, header_offset)
        signature, flags, method, crc, stored, size, name_bytes, extra_bytes, comment_bytes, offset = fields
        if signature != b"PK\1\2":
            raise zipfile.BadZipFile(f"its directory is damaged at byte {header_offset:,} of {len(self.directory):,}")
        name_end = header_offset + HEADER.size + name_bytes
        name = raw_name = self.directory[header_offset + HEADER.size : name_end]
        if not (flags & UTF8_NAME or name.isascii()):
            name = name.decode("cp437").encode()
        method = ENCRYPTED_METHOD if flags & ENCRYPTED else method
        try:
            for kind, data in _extra_fields(self.directory[name_end : name_end + extra_bytes]):
                if kind == ZIP64:
                    size, stored, offset = _widen([size, stored, offset], data)
                elif kind == UNICODE_NAME and data[:5] == struct.pack("<BL", 1, zlib.crc32(raw_name)):
                    name = data[5:] or name
        except (zipfile.BadZipFile, struct.error):
            method = DAMAGED_METHOD
        slot = ZipSlot(self.num_bytes_before + offset, stored, size, method, crc)
        if not self._may_be(slot):
            slot = ZipSlot(0, 0, 0, DAMAGED_METHOD, 0)
        return name, slot, name_end + extra_bytes + comment_bytes

    def _may_be(self, slot: ZipSlot) -> bool:
        """Whether a member lies in the file and can be as large as it says; only what was read is known of it."""
        if slot.method == DAMAGED_METHOD or slot.header_offset + slot.num_stored_bytes > self.file_bytes:
            return False
        growth = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}.get(slot.method)
        return growth is None or slot.num_bytes <= slot.num_stored_bytes * growth


def _find_directory(location: Location) -> tuple[int, int, int, int]:
    """Returns where a zip's directory begins, its bytes, the bytes in front of the zip, and those of the file."""
    with named_errors(location):
        file_bytes = location.stat().st_size
    tail_bytes = min(file_bytes, MAX_END_BYTES)
    tail = read_range(str(location), file_bytes - tail_bytes, tail_bytes) if tail_bytes else b""
    end = tail[: 4 - END.size].rfind(b"PK\5\6")  # with room for the rest of it
    if end < 0:
        raise zipfile.BadZipFile("it does not end like one")
    _, num_bytes, offset = END.unpack_from(tail, end)
    if tail.startswith(b"PK\6\7", max(0, end - 20)):
        end -= END64.size
        signature, num_bytes, offset = END64.unpack_from(tail, max(0, end))
        if signature != b"PK\6\6":
            raise zipfile.BadZipFile("its zip64 end is damaged")
    start = file_bytes - tail_bytes + end - num_bytes
    if start < offset:
        raise zipfile.BadZipFile(f"{offset - start:,} bytes of it are missing")
    return start, num_bytes, start - offset, file_bytes


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields kind and content of each field in the extra field."""
    while len(extra) >= 4:
        kind, num_bytes = struct.unpack_from("<HH", extra)
        if 4 + num_bytes > len(extra):
            raise zipfile.BadZipFile(f"extra field {kind:04x} is damaged")
        yield kind, extra[4 : 4 + num_bytes]
        extra = extra[4 + num_bytes :]


def _widen(values: list[int], data: bytes) -> list[int]:
    """Returns the values with those that take 64 bits from the zip64 field, which holds them in the same order."""
    wide = iter(struct.unpack_from(f"<{values.count(IN_EXTRA_FIELD)}Q", data))
    return [next(wide) if value == IN_EXTRA_FIELD else value for value in values]


def read_member(file: str, name: str, slot: ZipSlot) -> bytes:
    """Returns the bytes of the member `name` of a zip file, which have the size and checksum that its directory says.

    Raises:
        Refused: It is damaged, encrypted or compressed in an unusual way.
    """
    if slot.method in UNREADABLE:
        raise Refused("zip_member", f"zip member {UNREADABLE[slot.method]}", name)
    if slot.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        told = f"zip member is compressed by method {slot.method}; use stored or deflated members"
        raise Refused("zip_member", told, name)
    guess = LOCAL_HEADER_BYTES + len(name.encode()) + SLACK_BYTES + slot.num_stored_bytes
    block = read_range(file, slot.header_offset, guess)
    if len(block) < LOCAL_HEADER_BYTES or not block.startswith(b"PK\3\4"):
        raise Refused("zip_member", "zip member has no header where the zip's directory says", name)
    start = LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", block[26:LOCAL_HEADER_BYTES]))  # name and extra field
    stored = block[start : start + slot.num_stored_bytes]
    if len(stored) < slot.num_stored_bytes:
        stored = read_range(file, slot.header_offset + start, slot.num_stored_bytes)
    try:
        data = stored if slot.method == zipfile.ZIP_STORED else _inflate(stored, slot.num_bytes)
    except zlib.error as error:
        raise Refused("zip_member", f"zip member is damaged: {error}", name) from None
    if len(data) != slot.num_bytes or zlib.crc32(data) != slot.crc:
        raise Refused("zip_member", "zip member is damaged: its checksum differs", name)
    return data


def _inflate(stored: bytes, num_bytes: int) -> bytes:
    """Returns at most one byte more than the zip's directory promises, whatever the member would swell to."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, num_bytes + 1)
