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
    parts = [part for part in PARTS if only is None or only.lower() in part.what.lower()]
    if not parts:
        raise UsageError(f"--only {only} is in no heading; there are: {'; '.join(part.what for part in PARTS)}")
    for option, is_given in (("--dry-run measures nothing", dry_run), ("--only leaves parts out", only is not None)):
        if is_given and out.resolve() == DOCS:
            raise UsageError(f"{option}; give --out FOLDER, outside docs/")
    if not dry_run:
        check_gpu()
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    results = make_report(parts, out, folder, dry_run)
    print(f"{out / 'gpu-report.md'} is written; the rows of each part, with what its process said, are in {folder}")
    if any(result.status != "done" for result in results):
        raise SystemExit(1)


def check_gpu() -> None:
    """Makes sure that there is something to report on.

    Raises:
        UsageError: There is not.
    """
    import torch  # a wrong option is told without

    if not torch.cuda.is_available():
        raise UsageError(
            "gpu-report needs a CUDA GPU that torch can see, and there is none; try --dry-run --out FOLDER"
        )


if __name__ == "__main__":
    run(main)
