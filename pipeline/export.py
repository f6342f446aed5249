"""A training checkpoint to a self-contained Hugging Face folder.

    python -m pipeline.export --checkpoint runs/demo/stage2 --out exports/demo

What the stage trained comes from the checkpoint, everything else from the run's base folder. A stage 1 checkpoint is
exported with its one projector in every layer, so that it can be tried before stage 2. `pipeline.export_hf` does it.
"""

from pathlib import Path
from typing import Annotated

import typer

from common.console import run
from model.hf_check import check_new_folder
from pipeline.checkpoint.run_info import find_checkpoint


def main(
    checkpoint: Annotated[Path, typer.Option(help="a run folder (its last checkpoint) or a checkpoint folder")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
) -> None:
    """Writes a training checkpoint as a self-contained Hugging Face folder."""
    found = find_checkpoint(checkpoint)
    check_new_folder(out)
    from pipeline.export_hf import export  # takes seconds: not before there is a checkpoint

    export(found, out)
    print(f"{found} -> {out}")


if __name__ == "__main__":
    run(main)
