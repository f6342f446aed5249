"""The steps of `make demo`, from drawn shapes to scores."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import psutil
from rich.console import Console
from rich.text import Text

from common.console import build_console, count_text
from common.files import write_whole
from data_prep.plan import Settings
from data_prep.shapes import write_dataset
from data_prep.shards import make_shards
from orchestration.demo_report import print_scores, write_examples, write_loss_curve
from orchestration.tiny_base import read_texts
from orchestration.tiny_models import build_tiny_base
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import load_config
from pipeline.evaluation.evaluate import evaluate
from pipeline.export_hf import export
from pipeline.loop import train
from pipeline.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def run_demo(out: Path, seed: int, num_train: int, num_test: int) -> None:
    """Runs the whole pipeline on drawn shapes in an empty folder, and scores the result."""
    console, started = build_console(), time.monotonic()
    with peak_memory() as memory:
        build_model(out, seed, num_train, num_test, console)
        tell(console, 7, "held-out questions, with the picture and with a blank one", "pipeline.evaluation.evaluate")
        model, questions, images = out / "export", out / "data/test.json", out / "data/images"
        seeing, blind = (evaluate(model, questions, images, blind=blank) for blank in (False, True))
    seconds, peak = time.monotonic() - started, max(memory)
    result = {
        "accuracy": seeing.accuracy,
        "blind_accuracy": blind.accuracy,
        "num_questions": seeing.num_questions,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }
    write_loss_curve(read_metrics(out / "stage1"), read_metrics(out / "stage2"), out / "loss.png")
    write_examples(seeing, blind, images, out / "examples.html")
    write_whole(out / "result.json", f"{json.dumps(result, indent=1)}\n".encode())
    print_scores(seeing, blind, console)
    example = seeing.answers[0]
    picture = images / example.question.images[0]
    console.print(Text.assemble(f"{picture}: {example.question.text} ", (example.text, "bold")))
    console.print(
        f"{seeing.accuracy:.1%} of {count_text(seeing.num_questions, 'question')} right, {blind.accuracy:.1%} without "
        f"the picture; {seconds:.0f} s, at most {peak / 1e9:.1f} GB of memory\n"
        f"Look at {out / 'loss.png'} and {out / 'examples.html'}, or ask it: make chat MODEL={model} IMAGE={picture}"
    )


def build_model(out: Path, seed: int, num_train: int, num_test: int, console: Console) -> None:
    """Makes everything up to the exported model."""
    data = out / "data"
    tell(console, 1, f"{count_text(num_train, 'training picture')} and {num_test:,} held-out ones", "data_prep.shapes")
    write_dataset(data, num_train, num_test, seed, image_size=64)

    tell(console, 2, "a tiny random language model and vision encoder become a base", "pipeline.import_hf")
    texts = chain(read_texts(data / "pretrain.json"), read_texts(data / "finetune.json"))
    build_tiny_base(texts, out / "base", seed=seed)

    tell(console, 3, "rows and pictures become WebDataset tars, on Ray", "data_prep.shards")
    for stage in ("pretrain", "finetune"):
        make_shards(data / f"{stage}.json", data / "images", out / "shards" / stage, Settings(seed=seed))

    base = [f"init.base={out / 'base'}", f"train.seed={seed}"]
    config = CONFIGS / "demo-stage1.yaml"
    tell(
        console, 4, "stage 1: one shared projector learns to caption", f"pipeline.train --config configs/{config.name}"
    )
    overrides = [f"data.shards={out / 'shards/pretrain'}", f"run_dir={out / 'stage1'}"]
    train(load_config(config, [*base, *overrides]))

    config = CONFIGS / "demo-stage2.yaml"
    tell(
        console,
        5,
        "stage 2: copies of it and the model learn to answer",
        f"pipeline.train --config configs/{config.name}",
    )
    overrides = [f"data.shards={out / 'shards/finetune'}", f"run_dir={out / 'stage2'}"]
    train(load_config(config, [*base, *overrides, f"init.projector={out / 'stage1'}"]))

    tell(console, 6, "the checkpoint becomes a Hugging Face folder", "pipeline.export")
    export(find_checkpoint(out / "stage2"), out / "export")


def tell(console: Console, number: int, what: str, module: str) -> None:
    """Prints the heading of a step and the command that does it alone."""
    console.print(Text.assemble((f"\n{number}/7 {what}", "bold"), (f"  python -m {module}", "dim")))


@contextmanager
def peak_memory(every_seconds: float = 0.5) -> Iterator[list[int]]:
    """Yields a list that grows with samples of the resident bytes of this process and all it started.

    Pages that processes share are counted for each, so the largest sample is an upper bound.
    """
    samples, done, process = [0], threading.Event(), psutil.Process()

    def sample() -> None:
        while not done.wait(every_seconds):
            total = 0
            for one in (process, *process.children(recursive=True)):
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # ended between the listing and the look
            samples.append(total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
