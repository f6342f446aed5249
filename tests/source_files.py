"""The files of this repository's own folders, with what is not committed yet and without bytecode."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def source_files(folders: Iterable[str]) -> list[Path]:
    """Returns the files below these folders, relative to `ROOT`."""
    files = (path for name in folders for path in (ROOT / name).rglob("*") if path.is_file())
    return [path.relative_to(ROOT) for path in files if path.parent.name != "__pycache__"]
