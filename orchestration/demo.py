"""`make demo`: the whole story on two CPU cores, in minutes.

Draws a small LLaVA-format data set of shapes, makes a tiny random language model and vision encoder, writes shards with
Ray, trains both stages, exports to Hugging Face format, and asks the exported model questions about pictures it has
never seen, with and without the picture. Leaves in its folder:

    result.json      accuracy, blind_accuracy, num_questions, seconds, peak_memory_bytes
    loss.png         the loss of both stages
    examples.html    questions and answers beside their pictures
    export/          the model, for `make chat`

`orchestration.demo_steps` is the story.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from common.console import UsageError, run

MADE = ("data", "base", "shards", "stage1", "stage2", "export")
RESULTS = ("result.json", "loss.png", "examples.html")
MARKER = ".saisa-demo"


def main(
    out: Annotated[Path, typer.Option(help="folder to write; an earlier demo in it is replaced")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="of the data, the weights and the order of samples")] = 0,
    num_train: Annotated[int, typer.Option(min=1, help="training images")] = 6000,
    num_test: Annotated[int, typer.Option(min=1, help="held-out images, four or five questions each")] = 300,
) -> None:
    """Runs the whole pipeline on drawn shapes and scores the result."""
    clear(out)
    from orchestration.demo_steps import run_demo  # takes seconds: not before there is a folder for it

    run_demo(out, seed, num_train, num_test)


def clear(out: Path) -> None:
    """Removes what an earlier demo left in `out`, and nothing else.

    Raises:
        UsageError: there are files in `out` that no demo wrote.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UsageError(f"--out {out}: holds files that no demo wrote; use a new folder")
    for name in (*MADE, *RESULTS):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


if __name__ == "__main__":
    run(main)
