"""Which code did it: what shards and checkpoints say of themselves."""

import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import PIL

REPOSITORY = Path(__file__).resolve().parents[1]


def code_version() -> dict[str, str]:
    """Returns this project's version and Pillow's, which decides what decodes; asked for before a run begins."""
    return {"saisa": _described() or _installed() or _declared() or "unknown", "pillow": PIL.__version__}


def _described() -> str:
    """Returns the commit, or nothing without git or without a repository, as in a slim image."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _installed() -> str:
    try:
        return metadata.version("saisa")
    except metadata.PackageNotFoundError:
        return ""


def _declared() -> str:
    try:
        return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    except (OSError, ValueError, KeyError):
        return ""
