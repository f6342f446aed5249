"""What a failed write means: the system's error behind a library's own, and what to do about it."""

import errno
import os
import re
from pathlib import Path

from rich.filesize import decimal

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers end their messages


def os_error_in(error: BaseException) -> OSError | None:
    """Returns the system's error that an error is, came with or quotes, or None.

    Libraries put it behind one of their own: torch says "unexpected pos 704 vs 598" where a disk is full.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        if quoted := IN_RUST.search(str(seen)):
            number = int(quoted[1])
            return OSError(number, os.strerror(number))
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def way_out(error: OSError) -> str:
    """Returns what to do about a failed write, with a semicolon before it; nothing where the error says it all."""
    if error.errno == errno.ENOSPC:
        return f"; {free_space(error.filename)}make room, then start again"
    if error.errno == errno.EDQUOT:
        return "; the quota there is used up: make room or ask for more, then start again"
    if error.errno == errno.EFBIG:
        return "; no file may be that large there: raise the limit (see `ulimit -f`), then start again"
    if error.errno == errno.EROFS:
        return "; mount it for writing, or name another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "; give this user the right to it (see `ls -ld`), then start again"
    return ""


def free_space(path: str | Path | None) -> str:
    """Returns what is free on the disk of a path, which need not be there: `1.2 MB are free in /runs: `."""
    if path is None or "://" in str(path):
        return ""
    folder = next((each for each in [Path(path), *Path(path).absolute().parents] if each.is_dir()), Path("/"))
    status = os.statvfs(folder)
    if status.f_files and not status.f_favail:
        return f"{folder} has no room for another file (inode), however small: "
    return f"{decimal(status.f_bavail * status.f_frsize)} are free in {folder}: "
