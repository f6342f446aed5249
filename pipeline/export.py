"""A training checkpoint to a self-contained Hugging Face folder.

    python -m pipeline.export --checkpoint runs/demo/stage2 --out exports/demo

    python -m pipeline.export --checkpoint runs/llava/stage2 --format llava-hf --out exports/llava-hf

What the stage trained comes from the checkpoint, everything else from the run's base folder. A stage 1 checkpoint is
exported with its one projector in every layer, so that it can be tried before stage 2. `pipeline.export_hf` does it.
"""

from pathlib import Path
from typing import Annotated

import typer

from common.console import UsageError, run
from model.hf_check import check_new_folder
from pipeline.checkpoint.run_info import find_checkpoint

FORMATS = ("saisa", "llava-hf", "llava")


def main(
    checkpoint: Annotated[Path, typer.Option(help="a run folder (its last checkpoint) or a checkpoint folder")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="saisa (every architecture, with its code), or for architecture llava: llava-hf (transformers' own "
            "LlavaForConditionalGeneration) or llava (LLaVA's own layout)",
        ),
    ] = FORMATS[0],
) -> None:
    """Writes a training checkpoint as a self-contained Hugging Face folder."""
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} must be one of {', '.join(FORMATS)}")
    found = find_checkpoint(checkpoint)
    check_new_folder(out)
    from pipeline.export_hf import export  # takes seconds: not before there is a checkpoint

    export(found, out, form)
    print(f"{found} -> {out}")


if __name__ == "__main__":
    run(main)
