"""Trains one phase of SAISA: stage 1 (`phase: pretrain`) or stage 2 (`phase: finetune`).

    torchrun --nproc-per-node 2 -m pipeline.train --config configs/demo-stage1.yaml train.max_steps=20

The same command continues an interrupted run from its last checkpoint. `pipeline.loop` is what it runs.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.console import run
from pipeline.config import check_places, load_config, to_yaml, with_resume


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, after the file")] = None,
    resume: Annotated[str | None, typer.Option(help="auto or newest_whole; short for checkpoint.resume=...")] = None,
    print_config: Annotated[bool, typer.Option(help="print the resolved configuration and exit")] = False,
) -> None:
    """Trains one phase of SAISA."""
    resolved = load_config(config, with_resume(overrides, resume))
    if print_config:
        sys.stdout.write(to_yaml(resolved))
        return
    check_places(resolved)
    from pipeline.loop import train  # takes seconds: not before the configuration is known to be right

    train(resolved)


if __name__ == "__main__":
    run(main)
