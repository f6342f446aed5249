"""What `make compare` trains and measures: one run for every architecture and seed, each in a folder of its own."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForImageTextToText

from common.console import UsageError, build_console, count_text
from common.files import write_whole
from common.json_files import read_json_object
from data_prep.plan import Settings
from data_prep.shapes import write_dataset
from data_prep.shards import make_shards
from model.flops import forward_flops, parameter_counts
from orchestration.compare_report import write_report
from orchestration.tiny_base import read_texts
from orchestration.tiny_models import build_tiny_base
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import RunConfig, load_config
from pipeline.evaluation.evaluate import evaluate
from pipeline.export_hf import export
from pipeline.layer_contribution import main as rank_layers
from pipeline.loop import train
from pipeline.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
VARIANTS: dict[str, tuple[str, ...]] = {
    "llava": ("model.architecture=llava",),
    "naavit": ("model.architecture=naavit",),
    "saisa": (),
    "saisa-full-stage1": ("model.pretrain_projectors=own",),
    "saisa-linear": ("model.projector=linear",),
    "saisa-resampler": ("model.projector=resampler", "model.resampler_tokens=28"),  # of 64, as 256 of 576 in the paper
    "saisa-blocks": ("model.block_size=2",),
    # Its language model stays frozen, and here that is a random one
    "flamingo": (
        "model.architecture=flamingo",
        "model.cross_attention=open_flamingo",
        "model.cross_attention_every=2",
    ),
}
"""Settings of both stages, by name."""
BASELINE = "llava"
FROZEN = "shortv"  # the baseline's weights, not trained again
NUM_TEXT = 64  # text tokens of a prompt, as in table 4 of the paper
NUM_TIMED = 15  # prefills of each model; the median counts


@dataclass(frozen=True)
class Size:
    """How much is trained and asked."""

    num_train: int
    num_test: int
    num_ranking: int  # questions by which layers are ranked
    stage1: tuple[str, ...]
    stage2: tuple[str, ...]


WHOLE = Size(4000, 150, 100, ("train.max_steps=50",), ("train.num_epochs=1",))
QUICK = Size(200, 10, 8, ("train.max_steps=3",), ("train.max_steps=4",))


@dataclass(frozen=True)
class Result:
    """What one run gave and cost.

    Attributes:
        accuracy: fraction of right answers to held-out questions.
        blind_accuracy: the same with blank pictures.
        num_added: parameters besides those of the language model and the encoder.
        training_flops: of both stages, without the encoder's.
        training_seconds: of both stages: as many steps as there were, each of their median time, without reading data.
        prefill_flops: of a prompt of `NUM_TEXT` text tokens and an image, without the encoder's.
    """

    accuracy: float
    blind_accuracy: float
    num_added: int
    training_flops: int
    training_seconds: float
    prefill_flops: int


def named_variants(only: str) -> list[str]:
    """Returns the architectures to compare; the baseline is always one.

    Raises:
        UsageError: A name is unknown.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"--only: {unknown[0]!r} is unknown; use some of {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if not names or name in (BASELINE, *names)]


def compare(out: Path, variants: Sequence[str], num_seeds: int, quick: bool) -> None:
    """Runs what is not finished, then writes the page."""
    console, size = build_console(), QUICK if quick else WHOLE
    prepare(out, size, num_seeds, console)
    results: dict[str, list[Result]] = {}
    for number, (seed, name) in enumerate((seed, name) for seed in range(num_seeds) for name in variants):
        heading = f"\n{number + 1}/{num_seeds * len(variants)} {name}, seed {seed}"
        console.print(Text(heading, "bold"))
        results.setdefault(name, []).append(finished(out, name, seed, size))
    for seed in range(num_seeds):
        console.print(Text(f"\n{FROZEN}: {BASELINE} with its least layers frozen, seed {seed}", "bold"))
        results.setdefault(FROZEN, []).append(frozen(out, seed, size, results[BASELINE][seed]))
    console.print(Text("\nprefill of every model, in turn", "bold"))
    seconds = prefill_seconds({name: folder(out, name, 0) / "export" for name in results})
    summary = {
        name: {"runs": [asdict(run) for run in runs], "prefill_seconds": seconds[name]}
        for name, runs in results.items()
    }
    write_whole(out / "compare.json", f"{json.dumps(summary, indent=1)}\n".encode())
    write_report(summary, BASELINE, quick, out, console)


def prepare(out: Path, size: Size, num_seeds: int, console: Console) -> None:
    """Makes the data, the shards and a base for each seed, where they are not there yet."""
    data = out / "data"
    if not (data / "done").is_file():
        console.print(f"{count_text(size.num_train, 'training picture')} and {size.num_test:,} held-out ones")
        write_dataset(data, size.num_train, size.num_test, seed=0, image_size=64)
        (data / "done").touch()
    for stage in ("pretrain", "finetune"):
        make_shards(data / f"{stage}.json", data / "images", out / "shards" / stage, Settings(seed=0))
    for seed in range(num_seeds):
        if not (base := out / "bases" / str(seed)).is_dir():
            texts = chain(read_texts(data / "pretrain.json"), read_texts(data / "finetune.json"))
            build_tiny_base(texts, base, seed=seed)


def folder(out: Path, name: str, seed: int) -> Path:
    """Returns where a run of a variant lies."""
    return out / "runs" / f"{name}-{seed}"


def finished(out: Path, name: str, seed: int, size: Size) -> Result:
    """Returns the result of a run, after running what is missing of it."""
    place = folder(out, name, seed)
    file = place / "result.json"
    if file.is_file():
        return Result(**read_json_object(file, "remove it to measure again"))
    stages = configs(out, name, seed, size)
    for config in stages:
        train(config)
    model, data = place / "export", out / "data"
    if not model.is_dir():
        export(find_checkpoint(stages[-1].run_dir), model)
    seeing, blind = (evaluate(model, data / "test.json", data / "images", blind=blank) for blank in (False, True))
    result = measured(stages, seeing.accuracy, blind.accuracy)
    write_whole(file, f"{json.dumps(asdict(result), indent=1)}\n".encode())
    return result


def frozen(out: Path, seed: int, size: Size, baseline: Result) -> Result:
    """Returns what the baseline gives when the layers that contribute least leave visual tokens as they are."""
    place, theirs, data = folder(out, FROZEN, seed), folder(out, BASELINE, seed) / "export", out / "data"
    file = place / "result.json"
    if file.is_file():
        return Result(**read_json_object(file, "remove it to measure again"))
    rank_layers(theirs, str(data / "test.json"), place, str(data / "images"), samples=size.num_ranking)
    layers = read_json_object(place / "contribution.json", "remove it to measure again")["frozen_layers"]
    shutil.rmtree(place / "export", ignore_errors=True)
    shutil.copytree(theirs, place / "export")
    described = read_json_object(theirs / "config.json", "remove its run to make it again")
    described |= {"architecture": "shortv", "frozen_layers": layers}
    write_whole(place / "export" / "config.json", json.dumps(described, indent=1).encode())
    seeing, blind = (evaluate(place / "export", data / "test.json", data / "images", blind=b) for b in (False, True))
    model = configs(out, BASELINE, seed, size)[1].model
    model = model.model_copy(update={"architecture": "shortv", "frozen_layers": tuple(layers)})
    result = replace(
        baseline,
        accuracy=seeing.accuracy,
        blind_accuracy=blind.accuracy,
        prefill_flops=int(forward_flops(model, NUM_TEXT, model.num_tokens_per_image, 1)),
    )
    write_whole(file, f"{json.dumps(asdict(result), indent=1)}\n".encode())
    return result


def configs(out: Path, name: str, seed: int, size: Size) -> tuple[RunConfig, RunConfig]:
    """Returns the runs of both stages."""
    place, shards = folder(out, name, seed), out / "shards"
    shared = [f"init.base={out / 'bases' / str(seed)}", f"train.seed={seed}", "log.tensorboard=false", *VARIANTS[name]]
    first = [f"run_dir={place / 'stage1'}", f"data.shards={shards / 'pretrain'}", *size.stage1]
    second = [f"run_dir={place / 'stage2'}", f"data.shards={shards / 'finetune'}", *size.stage2]
    second += [f"init.projector={place / 'stage1'}"]
    return (
        load_config(CONFIGS / "demo-stage1.yaml", [*shared, *first]),
        load_config(CONFIGS / "demo-stage2.yaml", [*shared, *second]),
    )


def measured(stages: Sequence[RunConfig], accuracy: float, blind_accuracy: float) -> Result:
    """Returns what a run came to, from its metrics and its sizes."""
    runs, model = [read_metrics(config.run_dir) for config in stages], stages[-1].model
    counts = parameter_counts(model, "finetune")
    seconds = [[step["step_seconds"] * (1 - step["data_wait_fraction"]) for step in steps] for steps in runs]
    return Result(
        accuracy=accuracy,
        blind_accuracy=blind_accuracy,
        num_added=counts.projectors + counts.blocks,
        training_flops=sum(step["training_flops"] for steps in runs for step in steps),
        training_seconds=round(sum(len(each) * median(each) for each in seconds), 2),
        prefill_flops=int(forward_flops(model, NUM_TEXT, model.num_tokens_per_image, 1)),
    )


@torch.no_grad()
def prefill_seconds(exports: Mapping[str, Path]) -> dict[str, float]:
    """Returns the median seconds of reading a prompt with an image, encoder included; models take turns."""
    models: dict[str, Any] = {
        name: AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
        for name, path in exports.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(NUM_TIMED + 3):
        for name, model in models.items():
            config = model.config
            edge = config.vision_config.image_size
            ids = torch.full((1, NUM_TEXT + config.num_image_tokens), 5)
            ids[0, 8 : 8 + config.num_image_tokens] = config.image_token_id
            started = time.perf_counter()
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, edge, edge), logits_to_keep=1)
            if number >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in seconds.items()}
