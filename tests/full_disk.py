"""Disks that are full: real ones, since libraries raise there what nobody would think of mocking."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MS_RDONLY = 1  # of mount(2)
DAC_CAPABILITIES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Lets this process, its threads and what it forks write no file beyond so many bytes; takes no privilege.

    Such a write fails as on a full disk, in Python, torch's zip writer and Rust alike, with EFBIG in ENOSPC's place.
    Python 3.12 would cut what it keeps of a module that is imported meanwhile, and every later process read that.
    """
    keeps_no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = keeps_no_bytecode
        signal.signal(signal.SIGXFSZ, before)


def mount_small_disk(folder: Path, num_bytes: int, read_only: bool = False) -> str | None:
    """Mounts a small disk for this process alone, which has one thread, and for as long as it lives.

    Returns None, or why the kernel refuses: it takes root, or unprivileged user namespaces.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        return f"needs root or unprivileged user namespaces ({error})"
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={num_bytes}".encode()
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", MS_RDONLY * read_only, options):
        return f"needs the right to mount a tmpfs ({os.strerror(ctypes.get_errno())})"
    return None


def obey_permissions() -> None:
    """Lets root, too, be denied what a folder's mode denies, for as long as this process lives.

    Source: capset(2): two 32-bit words each of effective, permitted and inheritable capabilities, version 3.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, sets)
    for word in range(3):
        sets[word] &= ~DAC_CAPABILITIES
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
