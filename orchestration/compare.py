"""`make compare`: the paper's comparison in miniature, on two CPU cores.

Trains every architecture of the family on the demo's drawn shapes, from the same base and on the same batches, with
several seeds each, one run after the other, and measures what each gives and costs. Leaves in its folder:

    compare.html     the tables and plots on one page, with what they say of the paper's claims
    *.png            the plots
    compare.json     every number
    runs/            a folder for each run: both stages, the exported model, its result

A comparison that was stopped goes on where it was; a finished one only writes its page again.
`orchestration.compare_runs` says what is compared.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.console import UsageError, run
from common.files import write_whole
from common.json_files import read_json_object

SETTINGS = "compare-settings.json"


def main(
    out: Annotated[Path, typer.Option(help="folder to write, or to go on in")] = Path("runs/compare"),
    seeds: Annotated[int, typer.Option(min=1, max=20, help="runs of each architecture")] = 3,
    only: Annotated[str, typer.Option(help="names with commas between, such as saisa,naavit; by default all")] = "",
    quick: Annotated[
        bool, typer.Option(help="one seed and a few steps: shows that it works, and nothing else")
    ] = False,
) -> None:
    """Trains and compares the architectures of the family."""
    check_folder(out, quick)
    from orchestration.compare_runs import compare, named_variants  # takes seconds: not before the folder is ours

    compare(out, named_variants(only), 1 if quick else seeds, quick)


def check_folder(out: Path, quick: bool) -> None:
    """Makes sure that a folder is new, or holds a comparison that can go on.

    Raises:
        UsageError: It holds something else, or a comparison of another size.
    """
    file, settings = out / SETTINGS, {"format": 1, "quick": quick}
    if file.is_file():
        if read_json_object(file, "name another folder") != settings:
            kind = "short" if quick else "whole"
            raise UsageError(f"--out {out}: holds another comparison than this {kind} one; use a new folder")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out}: holds files that no comparison wrote; use a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{json.dumps(settings)}\n".encode())


if __name__ == "__main__":
    run(main)
