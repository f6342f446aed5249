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


def member_bytes(num_bytes: int) -> int:
    """Returns the bytes that a member with `num_bytes` of content takes in a tar."""
    return BLOCK_BYTES + num_bytes + -num_bytes % BLOCK_BYTES


def tar_sample(key: str, members: Iterable[tuple[str, bytes]]) -> bytes:
    """Returns the tar blocks of one sample, from (extension, content) pairs."""
    parts = []
    for extension, content in members:
        header = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: mode 644, time 0, owner 0
        header.size = len(content)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK_BYTES)]
    return b"".join(parts)
