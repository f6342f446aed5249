"""A language model and a vision encoder small enough to train on two CPU cores, with random weights.

    python -m orchestration.tiny_base --data rows.json --out bases/tiny                          a tokenizer of its own
    python -m orchestration.tiny_base --data rows.json --out bases/tiny --tokenizer vicuna-7b     or a given one

`orchestration.tiny_models` says how its weights are drawn.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from common.console import build_console, count_text, run
from data_prep.records import check_row
from data_prep.row_shapes import Refused
from data_prep.source import open_rows
from model.hf_check import check_new_folder


def read_texts(data: str | Path) -> Iterator[str]:
    """Yields the text of every turn of the rows that `make shards` would take, and counts the others on stderr.

    Raises:
        ValueError: The rows cannot be read, or all of them would be refused.
    """
    num_taken, num_refused, first = 0, 0, ""
    with open_rows(data, keep_images=False) as (rows, _):
        for row in rows:
            try:
                turns = check_row(row.value).row["conversations"]
            except Refused as problem:
                num_refused, first = num_refused + 1, first or f"index {row.index}: {problem}"
                continue
            num_taken += 1
            yield from (turn["value"] for turn in turns)
    if not num_taken:
        raise ValueError(f"{data}: `make shards` would refuse every row ({first})")
    if num_refused:
        told = f"{count_text(num_refused, 'row')} left out, which `make shards` would refuse; {first}"
        build_console(stderr=True).print(told)


def main(
    data: Annotated[str, typer.Option(help="rows that a tokenizer is trained on: all that `make shards` takes")],
    out: Annotated[Path, typer.Option(help="base folder to write; must not exist or be empty")],
    tokenizer: Annotated[Path | None, typer.Option(help="folder of a tokenizer to use instead")] = None,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Writes a tiny random base to try the pipeline with, on a CPU and on your own data."""
    check_new_folder(out)
    texts = read_texts(data)
    first = next(texts)
    from orchestration.tiny_models import build_tiny_base  # takes seconds: not before the rows can be read

    config = build_tiny_base(chain([first], texts), out, tokenizer=tokenizer, seed=seed)
    same = f"model.vocab_size={config.vocab_size} init.base={out} data.shards={out}-shards data.template=v1"
    print(
        f"{out} is ready. These lines make shards (name the folder of your images there) and train on it;\n"
        "few rows want a smaller train.global_batch_size and more train.num_epochs.\n"
        f"make shards DATA={data} IMAGES=images OUT={out}-shards\n"
        f'make train CONFIG=configs/demo-stage1.yaml ARGS="{same} run_dir={out}-stage1"\n'
        f'make train CONFIG=configs/demo-stage2.yaml ARGS="{same} run_dir={out}-stage2 init.projector={out}-stage1"'
    )


if __name__ == "__main__":
    run(main)
