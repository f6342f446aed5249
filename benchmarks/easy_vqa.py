"""Trains on real questions (easy-VQA, 1,000 drawn images, MIT) and compares with guessing from the question alone.

    python -m benchmarks.easy_vqa --data EASY_VQA_FOLDER --out runs/easy_vqa

The folder holds `llava_train.json` and the images its rows name. The first 900 rows are for training, the last 100
for testing. A row asks about ten questions in turn, and earlier answers give later ones away, so each question becomes
a row of its own. The recipe is the demo's. About four minutes on two CPU cores.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.console import build_console, run
from data_prep.plan import Settings
from data_prep.shards import make_shards
from orchestration.demo_steps import CONFIGS
from orchestration.tiny_base import read_texts
from orchestration.tiny_models import build_tiny_base
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import load_config
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.questions import Question, question_only_accuracy, read_questions
from pipeline.export_hf import export
from pipeline.loop import train

NUM_TRAIN_ROWS = 900


def single_turn(question: Question, number: int) -> dict:
    """Returns a row that asks one question."""
    turns = [{"from": "human", "value": question.prompt}, {"from": "gpt", "value": question.expected}]
    return {"id": f"{question.row_id}-{number}", "image": question.images[0], "conversations": turns}


def main(
    data: Annotated[Path, typer.Option(help="folder with llava_train.json and its images")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")] = Path("runs/easy_vqa"),
    max_steps: Annotated[int, typer.Option(help="optimizer steps of stage 2")] = 400,
) -> None:
    """Trains on easy-VQA and prints its accuracy beside that of guessing."""
    out.mkdir(parents=True)
    parts = {"train": slice(NUM_TRAIN_ROWS), "test": slice(NUM_TRAIN_ROWS, None)}
    for name, rows in parts.items():
        questions = read_questions(data / "llava_train.json", rows)
        (out / f"{name}.json").write_text(json.dumps([single_turn(q, n) for n, q in enumerate(questions)]))

    make_shards(out / "train.json", data, out / "shards", Settings())
    build_tiny_base(read_texts(out / "train.json"), out / "base")
    overrides = [f"init.base={out / 'base'}", f"data.shards={out / 'shards'}", "data.template=v1"]
    train(load_config(CONFIGS / "demo-stage1.yaml", [*overrides, f"run_dir={out / 'stage1'}", "train.max_steps=20"]))
    longer = ["train.global_batch_size=64", f"train.max_steps={max_steps}", f"init.projector={out / 'stage1'}"]
    train(load_config(CONFIGS / "demo-stage2.yaml", [*overrides, *longer, f"run_dir={out / 'stage2'}"]))
    export(find_checkpoint(out / "stage2"), out / "export")

    seeing, blind = (evaluate(out / "export", out / "test.json", data, blind=blank) for blank in (False, True))
    guessing = question_only_accuracy(*(read_questions(out / f"{name}.json") for name in parts))
    build_console().print(
        f"{seeing.num_questions:,} questions about images it was not trained on: {seeing.accuracy:.1%} right, "
        f"{blind.accuracy:.1%} without the image, {guessing:.1%} by guessing from the question"
    )


if __name__ == "__main__":
    run(main)
