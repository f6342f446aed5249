"""What `make submit` would upload, looked at before it is: `python -m orchestration.submit_check`.

Ray takes the whole folder but for .gitignore, .rayignore and a list of its own. It reads and packs all of it before it
says that a package of more than 512 MiB cannot be uploaded.
"""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from common.console import UsageError, run

MAX_BYTES = 50_000_000  # the code takes three
NUM_NAMED = 5


def main(folder: Annotated[Path, typer.Argument(help="what `make submit` uploads")] = Path()) -> None:
    """Refuse to upload more than code."""
    check_size(files_to_upload(folder.absolute()), folder.absolute())


def files_to_upload(folder: Path) -> dict[Path, int]:
    """Returns the bytes of each file that Ray would take along, by Ray's own rules."""
    # Ray takes seconds to import, and has no public function for this
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path] = path.stat().st_size

    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, note, include_gitignore=gitignore, logger=logging.getLogger("quiet"))
    return found


def check_size(found: dict[Path, int], folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Makes sure that what is uploaded can be code alone.

    Raises:
        UsageError: It is larger; names the largest files.
    """
    if (num_bytes := sum(found.values())) > max_bytes:
        largest = sorted(found, key=lambda path: (-found[path], path))[:NUM_NAMED]
        named = ", ".join(f"{path.relative_to(folder)} ({found[path] / 1e6:,.1f} MB)" for path in largest)
        raise UsageError(
            f"make submit would upload {num_bytes / 1e6:,.1f} MB of {folder}, more than {max_bytes / 1e6:,.0f}; "
            f"the largest: {named}; move them out of this folder or list them in .rayignore"
        )


if __name__ == "__main__":
    run(main)
