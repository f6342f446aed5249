"""Names from outside that become paths: they lead nowhere else."""

import os
from pathlib import Path
from typing import Any


def check_regular(path: object) -> None:
    """Makes sure that a path, if it is a local one, is no pipe, socket or device: reading one may wait, or never end.

    Raises:
        ValueError: It is one.
    """
    if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device; only regular files are read")


def check_plain(name: Any, root: Path) -> None:
    """Makes sure that a name is one of a file in the folder `root`, which may be a link.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain file name; nothing outside {root} is touched")


def within(root: Path, *names: str) -> Path:
    """Returns `root / name / ...` if that is where it says: in the folder `root`, which alone may be a link.

    Raises:
        ValueError: A name is no plain file name, a link leads elsewhere, or it is a pipe or a device.
    """
    for name in names:
        check_plain(name, root)
    path = root.joinpath(*names)
    if (found := os.path.realpath(path)) != os.path.join(os.path.realpath(root), *names):
        raise ValueError(f"{path} is a link that leads to {found}, out of {root}; remove the link")
    check_regular(path)
    return path
