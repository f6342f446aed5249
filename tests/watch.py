"""What is in a folder, to see that nothing there was touched."""

import os
from pathlib import Path

type Snapshot = dict[str, tuple[int, int, bytes]]


def snapshot(root: Path) -> Snapshot:
    """Returns mode, time of change and content of everything under a folder, links as such."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            status = path.lstat()
            content = os.readlink(path).encode() if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
            found[str(path)] = status.st_mode, 0 if path.is_dir() else status.st_mtime_ns, content
    return found
