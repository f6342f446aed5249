"""Plain USTAR bytes that depend on names and contents alone: fixed time, owner and mode, no extensions.

A sample is a run of whole 512-byte blocks, the record first and its images behind it, so one read of
`[offset, offset + size)` brings all of it::

    000000042.json  header 512 | record    padded to 512
    000000042.jpg   header 512 | image     padded to 512
    ...
    end of archive  1024 zero bytes
"""

import tarfile
from collections.abc import Iterable

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)

# tarfile's own header of an empty, nameless member (mode 644, time 0, owner 0), cut at the fields that differ between
# members. Filling these in takes a tenth of the time of `TarInfo.tobuf`, which is much of what a small sample costs.
_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME_BYTES, _SIZE_DIGITS = 100, 11
_BEFORE_SIZE, _BEFORE_CHECKSUM, _AFTER_CHECKSUM = _EMPTY[_NAME_BYTES:124], _EMPTY[135:148], _EMPTY[156:]
_FIXED_SUM = sum(_BEFORE_SIZE + b" " * 8 + _BEFORE_CHECKSUM + _AFTER_CHECKSUM)  # the checksum counts itself as spaces


def member_bytes(num_bytes: int) -> int:
    """Returns the bytes that a member with `num_bytes` of content takes in a tar."""
    return BLOCK_BYTES + num_bytes + -num_bytes % BLOCK_BYTES


def tar_sample(key: str, members: Iterable[tuple[str, bytes]]) -> bytes:
    """Returns the tar blocks of one sample, from (extension, content) pairs."""
    parts = []
    for extension, content in members:
        parts += [tar_header(f"{key}.{extension}", len(content)), content, bytes(-len(content) % BLOCK_BYTES)]
    return b"".join(parts)


def tar_header(name: str, num_bytes: int) -> bytes:
    """Returns what `tarfile` writes in front of a file of this name and size."""
    named, size = name.encode(), b"%0*o" % (_SIZE_DIGITS, num_bytes)
    assert len(named) <= _NAME_BYTES and len(size) == _SIZE_DIGITS, f"{name}: {num_bytes} bytes do not fit USTAR"
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(named) + sum(size))
    return b"".join((named.ljust(_NAME_BYTES, b"\0"), _BEFORE_SIZE, size, _BEFORE_CHECKSUM, checksum, _AFTER_CHECKSUM))
