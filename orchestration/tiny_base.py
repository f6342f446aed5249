"""A language model and a vision encoder small enough to train on two CPU cores, with random weights.

    python -m orchestration.tiny_base --data rows.json --out bases/tiny                          a tokenizer of its own
    python -m orchestration.tiny_base --data rows.json --out bases/tiny --tokenizer vicuna-7b     or a given one

`orchestration.tiny_models` says how its weights are drawn.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from common.console import run
from data_prep.json_rows import read_rows
from data_prep.row_shapes import to_llava


def read_texts(data: Path) -> Iterable[str]:
    """Yields the text of every turn of a LLaVA JSON or JSONL file."""
    for row in read_rows(data):
        yield from (turn["value"] for turn in to_llava(row.value)[0]["conversations"])


def main(
    data: Annotated[Path, typer.Option(help="LLaVA rows that the tokenizer is trained on")],
    out: Annotated[Path, typer.Option(help="base folder to write; must not exist or be empty")],
    tokenizer: Annotated[Path | None, typer.Option(help="folder of a tokenizer to use instead")] = None,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Writes a tiny random base to try the pipeline with, on a CPU and on your own data."""
    texts = iter(read_texts(data))
    first = next(texts, "")
    from orchestration.tiny_models import build_tiny_base  # takes seconds: not before the rows can be read

    config = build_tiny_base(chain([first], texts), out, tokenizer=tokenizer, seed=seed)
    same = f"model.vocab_size={config.vocab_size} init.base={out}"
    print(
        f"{out} is ready; train on it with the lines below. SHARDS1 are captions (for conversations, add\n"
        "data.template=v1), SHARDS2 conversations; few rows want a smaller train.global_batch_size and more\n"
        "train.num_epochs.\n"
        f'make train CONFIG=configs/demo-stage1.yaml ARGS="{same} data.shards=SHARDS1 run_dir=RUN1"\n'
        f'make train CONFIG=configs/demo-stage2.yaml ARGS="{same} data.shards=SHARDS2 run_dir=RUN2 init.projector=RUN1"'
    )


if __name__ == "__main__":
    run(main)
