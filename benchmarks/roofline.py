"""A training step's time on paper: from a trace of a fake GPU, what every kernel, collective and launch should take.

    python -m benchmarks.roofline --config configs/saisa-vicuna-7b-stage2.yaml --world 8

Nothing is measured. A kernel takes as long as its slower half: its FLOPs at the rate that large matrix products (or
attention) are known to reach, or its bytes at the bandwidth of the memory, and never less than a launch. Two and three
layers are traced; what the third adds is taken for each of the model's. All collectives count as waited for. FLOPs of
the model are those of `model.flops`: products counted once, attention as full rectangles, nothing that is recomputed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, BadParameter, Option

from benchmarks.fake_gpu.traces import Case, Event, Load, Trace, trace_all
from common.console import build_console, run
from model.flops import encoder_forward_flops, training_flops
from pipeline.config import RunConfig, load_config


@dataclass(frozen=True)
class Chip:
    """What a GPU reaches, a second, in practice.

    Attributes:
        peak_flops: of bf16 products, by its data sheet; MFU is a fraction of it.
        product_flops: of large bf16 matrix products.
        fp8_product_flops: of large FP8 matrix products.
        attention_flops: of flash attention forward, and backward.
        memory_bytes: read or written.
        node_bytes: that a ring collective within a node moves in each direction.
        network_bytes: the same between nodes, for each GPU.
        launch_seconds: the least a kernel takes.
    """

    peak_flops: float
    product_flops: float
    fp8_product_flops: float
    attention_flops: tuple[float, float]
    memory_bytes: float
    node_bytes: float
    network_bytes: float
    launch_seconds: float


GPUS_OF_A_NODE = 8
CHIPS = {
    # Source: NVIDIA's H100 SXM data sheet (989 TFLOP/s, 3.35 TB/s, NVLink 450 GB/s a direction) and 400 Gb/s a GPU;
    # products at 61% of the peak, attention as FlashAttention-2 and -3 report on it, links and memory at 80 to 90%.
    "h100": Chip(989e12, 600e12, 1000e12, (400e12, 330e12), 3.0e12, 360e9, 40e9, 3e-6),
}


def seconds_of(event: Event, chip: Chip) -> float:
    """Returns the predicted time of an event; 0 for a copy, which runs beside kernels, and for a host's wait."""
    if event.kind == "kernel":
        rate = chip.product_flops
        if "attn" in event.name or "attention" in event.name:
            rate = chip.attention_flops["backward" in event.name]
        elif any(dtype.startswith("float8") for dtype in event.dtypes):
            rate = chip.fp8_product_flops
        return max(event.flops / rate, event.num_bytes / chip.memory_bytes, chip.launch_seconds)
    if event.kind == "collective":
        return collective_seconds(event, chip)
    return 0.0


def collective_seconds(event: Event, chip: Chip) -> float:
    """Returns the time of a ring over the processes of a group; an all-reduce goes round twice."""
    size = len(event.ranks)
    if size < 2:
        return 0.0
    across = max(event.ranks) // GPUS_OF_A_NODE != min(event.ranks) // GPUS_OF_A_NODE
    rounds = 2 if event.name == "allreduce" else 1
    bandwidth = chip.network_bytes if across else chip.node_bytes
    return chip.launch_seconds + rounds * (size - 1) / size * event.num_bytes / bandwidth


def kind_of(event: Event) -> str:
    """Returns the line of the table that an event belongs to."""
    if event.kind != "kernel":
        return event.kind
    if event.source.startswith("model/hf/"):
        return "encoder"
    if "attn" in event.name or "attention" in event.name:
        return "attention"
    if event.flops:
        return "matrix products"
    if event.name.startswith("te.multi_tensor") or event.source.startswith("pipeline/optimizer.py"):
        return "optimizer"
    return "bandwidth-bound kernels"


def times(trace: Trace, chip: Chip) -> tuple[Counter[str], Counter[str]]:
    """Returns the seconds and the number of events of each kind."""
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in trace.events:
        seconds[kind_of(event)] += seconds_of(event, chip)
        counts[kind_of(event)] += 1
    return seconds, counts


def at_layers(two: Counter[str], three: Counter[str], num_layers: int) -> dict[str, float]:
    """Returns what a model of `num_layers` has, if each of its layers adds what the third does."""
    return {kind: two[kind] + (num_layers - 2) * (three[kind] - two[kind]) for kind in three}


def model_flops(config: RunConfig, load: Load) -> tuple[int, int]:
    """Returns the FLOPs of a process's step: the model's alone, and with those of an encoder such as CLIP's."""
    visual, vision = load.num_images * config.model.vision.num_tokens, config.model.vision
    targets = int(load.num_text * load.target_fraction)
    num_samples = load.num_packs * load.num_samples
    model = num_samples * training_flops(config.model, config.phase, load.num_text, visual, targets)
    images = num_samples * load.num_images
    return model, model + images * encoder_forward_flops(vision, 4 * vision.hidden_size)


def main(
    config: Annotated[Path, Option(help="the recipe")],
    gpu: Annotated[str, Option(help=f"one of {', '.join(CHIPS)}")] = "h100",
    world: Annotated[int, Option(help="processes", min=1)] = 8,
    packs: Annotated[int, Option(help="packs of a process in a step", min=1)] = 1,
    samples: Annotated[int, Option(help="samples of a pack", min=1)] = 16,
    text: Annotated[int, Option(help="text tokens of a sample", min=1)] = 256,
    images: Annotated[int, Option(help="images of a sample", min=0)] = 1,
    overrides: Annotated[list[str] | None, Argument(help="settings of the recipe, as section.key=value")] = None,
) -> None:
    """Predicts the time of a training step."""
    if gpu not in CHIPS:
        raise BadParameter(f"{gpu} is unknown; use {', '.join(CHIPS)}", param_hint="--gpu")
    settings, load, chip = tuple(overrides or ()), Load(packs, samples, text, images), CHIPS[gpu]
    recipe = load_config(config, [*settings])
    if recipe.parallel.pp > 1:
        raise BadParameter("a pipeline's idle time is not predicted; leave parallel.pp=1", param_hint="overrides")
    cases = [Case(config, (*settings, f"model.num_layers={n}"), load, world) for n in (2, 3)]
    (two, counts_two), (three, counts_three) = (times(trace, chip) for trace in trace_all(cases))
    seconds = at_layers(two, three, recipe.model.num_layers)
    counts = at_layers(counts_two, counts_three, recipe.model.num_layers)
    total = sum(seconds.values())
    table = Table(
        title=f"{config.stem}, {packs} x {samples} samples a process, {world} x {gpu}: predicted, not measured"
    )
    for heading in ("", "ms", "of the step", "number"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if kind != "wait":
            table.add_row(kind, f"{value * 1e3:.1f}", f"{value / total:.1%}", f"{counts[kind]:,.0f}")
    table.add_row("step", f"{total * 1e3:.1f}", "", "")
    console = build_console()
    console.print(table)
    alone, with_encoder = model_flops(recipe, load)
    console.print(
        f"MFU: {alone / total / chip.peak_flops:.1%} of the model's FLOPs, "
        f"{with_encoder / total / chip.peak_flops:.1%} with the encoder's; the host waits {counts['wait']:.0f} times"
    )


if __name__ == "__main__":
    run(main)
