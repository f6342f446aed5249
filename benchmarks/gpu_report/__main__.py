"""What a GPU does with this repository, in nine minutes: `make gpu-report` writes docs/gpu-report.json and .md.

python -m benchmarks.gpu_report                          on a GPU
python -m benchmarks.gpu_report --dry-run --out FOLDER   every part at tiny sizes, on a CPU: numbers mean nothing

`benchmarks.gpu_report.runner` lists the parts.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu_report.runner import PARTS, make_report
from common.console import UsageError, run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(
    out: Annotated[Path, typer.Option(help="folder for gpu-report.json and gpu-report.md")] = DOCS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="on a CPU, at tiny sizes, to see that it runs")] = False,
    only: Annotated[str | None, typer.Option(help="the parts whose heading holds this")] = None,
) -> None:
    """Writes what a GPU does with this repository."""
    if dry_run and out == DOCS:
        raise UsageError("--dry-run measures nothing; give --out FOLDER, outside docs/")
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if only is None or only.lower() in part.what.lower()]
    folder = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    results = make_report(parts, out, folder, dry_run)
    print(f"{out / 'gpu-report.md'} is written; the rows of each part, with what its process said, are in {folder}")
    if any(result.status != "done" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
