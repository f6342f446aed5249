"""A training step's time on paper: from a trace of a fake GPU, what every kernel, collective and launch should take.

    python -m benchmarks.roofline --config configs/saisa-vicuna-7b-stage2.yaml --world 8

Nothing is measured; the whole step is traced, which takes half a minute. A kernel takes as long as its slower half: its
FLOPs at the rate that large matrix products (or attention) are known to reach, or its bytes at the bandwidth of the
memory, and never less than a launch. Sums of gradients run beside the backward pass and collected weights beside the
forward pass, at full speed both; all other collectives count as waited for, messages between stages too. In a pipeline
the slowest stage tells the time, and how long it idles. FLOPs of the model are those of `model.flops`: products counted
once, attention as full rectangles, nothing that is recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from rich.table import Table
from typer import BadParameter, Option

from benchmarks.fake_gpu.options import Config, Images, Overrides, Packs, Samples, Text, World, build_load
from benchmarks.fake_gpu.traces import Case, Event, Load, Trace, trace_all
from common.console import build_console, count_text, run
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
QUANTIZING = {
    f"te.{name}"
    for name in (
        "quantize",
        "quantize_dbias",
        "compute_amax",
        "compute_scale_from_amax",
        "fp8_transpose",
        "partial_amax",
        "partial_cast",
        "amax_and_scale_update",
        "swap_first_dims",
        "dequantize",
    )
}
"""Transformer Engine's kernels that make or lay out 8-bit numbers."""
NUM_LISTED = 16
CHIPS = {
    # Source: NVIDIA's H100 SXM data sheet (989 TFLOP/s, 3.35 TB/s, NVLink 450 GB/s a direction) and 400 Gb/s a GPU;
    # products at 61% of the peak, attention as FlashAttention-2 and -3 report on it, links and memory at 80 to 90%.
    "h100": Chip(989e12, 600e12, 1000e12, (400e12, 330e12), 3.0e12, 360e9, 40e9, 3e-6),
}


def seconds_of(event: Event, chip: Chip) -> float:
    """Returns the predicted time of an event; 0 for a copy, which runs beside kernels, and for a host's wait."""
    if event.kind == "kernel":
        rate = chip.product_flops
        if is_attention(event):
            rate = chip.attention_flops["backward" in event.name]
        elif any(dtype.startswith("float8") for dtype in event.dtypes):
            rate = chip.fp8_product_flops
        return max(event.flops / rate, event.num_bytes / chip.memory_bytes, chip.launch_seconds)
    if event.kind == "collective":
        return collective_seconds(event, chip)
    return 0.0


def is_attention(event: Event) -> bool:
    """Whether an event is a kernel of attention, torch's, flash-attn's or FlexAttention's."""
    return "attn" in event.name or "attention" in event.name


def seconds_of_all(events: Sequence[Event], chip: Chip) -> list[float]:
    """Returns what each event adds to a step.

    Buckets of gradients are summed beside the backward pass, one after another from when each is asked for; what is
    left at its end is waited for, and counts for the last. Weights asked for at the end of a step are collected beside
    the forward pass of the next; what takes longer counts for the first.
    """
    seconds = [seconds_of(event, chip) for event in events]
    backward = [at for at, event in enumerate(events) if event.source.startswith("backward")]
    sums = [at for at in backward if events[at].name == "reduce_scatter_tensor_coalesced"]
    if sums:
        now = link_is_free = 0.0
        for at in range(backward[-1] + 1):
            if at in sums:
                link_is_free = max(link_is_free, now) + seconds[at]
                seconds[at] = 0.0
            else:
                now += seconds[at]
        seconds[sums[-1]] = max(0.0, link_is_free - now)
    gathers = [at for at, event in enumerate(events) if is_gather_beside(event)]
    if gathers:
        total = sum(seconds[at] for at in gathers)
        for at in gathers:
            seconds[at] = 0.0
        seconds[gathers[0]] = max(0.0, total - sum(seconds[: backward[0]]))
    return seconds


def is_gather_beside(event: Event) -> bool:
    """Whether weights are collected beside the next step; the optimizer itself asks for them where they are not."""
    return event.name == "allgather_into_tensor_coalesced" and event.source.startswith("pipeline/replicas.py")


def collective_seconds(event: Event, chip: Chip) -> float:
    """Returns the time of a ring over the processes of a group, an all-reduce goes round twice; or of a message."""
    size = len(event.ranks)
    if size < 2:
        return 0.0
    num_nodes = len({rank // GPUS_OF_A_NODE for rank in event.ranks})
    rounds = 1.0 if event.name in ("send", "recv") else (2 if event.name == "allreduce" else 1) * (size - 1) / size
    # Across nodes a ring goes through the network adapters of all its processes of a node at once.
    bandwidth = chip.node_bytes if num_nodes == 1 else min(chip.node_bytes, size / num_nodes * chip.network_bytes)
    return chip.launch_seconds + rounds * event.num_bytes / bandwidth


def kind_of(event: Event) -> str:
    """Returns the line of the table that an event belongs to."""
    if event.kind != "kernel":
        return event.kind
    if event.source.startswith("model/hf/") or event.name == "te.qgelu":
        return "encoder"
    if is_attention(event):
        return "attention"
    if event.flops:
        return "matrix products"
    if event.name in QUANTIZING:
        return "scaling to 8 bits"
    if event.name.startswith("te.multi_tensor") or event.source.startswith("pipeline/optimizer.py"):
        return "optimizer"
    return "bandwidth-bound kernels"


Key = tuple[str, str, str]  # kind, operation, line


class Cost(NamedTuple):
    """Of some events together: their time, and how many they are."""

    seconds: float
    number: int


def costs(trace: Trace, chip: Chip) -> dict[Key, Cost]:
    """Returns what each operation at each line costs in a step."""
    found: dict[Key, Cost] = {}
    for event, added in zip(trace.events, seconds_of_all(trace.events, chip), strict=True):
        key = (kind_of(event), event.name, event.source)
        seconds, number = found.get(key, Cost(0, 0))
        found[key] = Cost(seconds + added, number + 1)
    return found


def slowest_stage(stages: Sequence[dict[Key, Cost]], num_turns: int) -> dict[Key, Cost]:
    """Returns what the stage of a pipeline that takes the longest costs in a step, the time it idles included.

    Source: arXiv 2104.04473, section 2.2: p stages idle for (p - 1) / (m v) of the time of their passes.

    Args:
        stages: the costs of each process of the pipeline.
        num_turns: m packs times v chunks of a process.
    """
    slowest = max(stages, key=lambda found: sum(cost.seconds for cost in found.values()))
    passes = sum(cost.seconds for key, cost in slowest.items() if is_of_passes(key))
    num_idle = len(stages) - 1
    idle = {("idle", "idle", "waiting for the other stages"): Cost(num_idle / num_turns * passes, 1)}
    return slowest | (idle if num_idle else {})


def is_of_passes(key: Key) -> bool:
    """Whether something happens in the forward and backward passes of packs, and not once a step."""
    kind, _, source = key
    return kind != "encoder" and source.startswith(("model/", "backward"))


def summed(costs: dict[Key, Cost], part: int) -> dict[str, Cost]:
    """Returns the costs by one part of their keys, the largest first."""
    found: dict[str, Cost] = {}
    for key, cost in costs.items():
        before = found.get(key[part], Cost(0, 0))
        found[key[part]] = Cost(before.seconds + cost.seconds, before.number + cost.number)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def model_flops(config: RunConfig, load: Load) -> tuple[float, float]:
    """Returns a process's part of a step's FLOPs: the model's alone, and with those of an encoder such as CLIP's."""
    vision, num_processes = config.model.vision, config.parallel.tp * config.parallel.pp
    num_samples = load.num_packs * load.num_samples / num_processes  # all processes of a replica have its packs
    sizes = load.num_text, load.num_images * config.model.num_tokens_per_image, load.num_targets
    model = num_samples * training_flops(config.model, config.phase, *sizes)
    images = num_samples * load.num_images
    return model, model + images * encoder_forward_flops(vision, vision.usual_ffn_hidden_size)


def main(
    config: Config,
    gpu: Annotated[str, Option(help=f"one of {', '.join(CHIPS)}")] = "h100",
    world: World = 8,
    packs: Packs = 1,
    samples: Samples = None,
    text: Text = 256,
    images: Images = 1,
    overrides: Overrides = None,
) -> None:
    """Predicts the time of a training step."""
    if gpu not in CHIPS:
        raise BadParameter(f"{gpu} is unknown; use {', '.join(CHIPS)}", param_hint="--gpu")
    settings, chip = tuple(overrides or ()), CHIPS[gpu]
    recipe = load_config(config, [*settings])
    load = build_load(recipe, packs, samples, text, images)
    parallel = recipe.parallel
    traces = trace_all([Case(config, settings, load, world, n * world // parallel.pp) for n in range(parallel.pp)])
    found = slowest_stage([costs(trace, chip) for trace in traces], packs * parallel.chunks_per_rank)
    total = sum(cost.seconds for cost in found.values())
    load_text = f"{count_text(packs, 'pack')} of {load.num_samples} samples a replica"
    title = f"{config.stem}, {load_text}, {world} x {gpu}: predicted, not measured"
    console = build_console()
    console.print(as_table(title, summed(found, 0), total))
    kernels = {
        key: cost for key, cost in found.items() if key[0] not in ("wait", "copy", "matrix products", "attention")
    }
    worst = sorted(kernels.items(), key=lambda item: -item[1].seconds)[:NUM_LISTED]
    lines = {f"{name}, {source}": cost for (_, name, source), cost in worst}
    console.print(as_table("besides matrix products and attention, by cost", lines, total))
    alone, with_encoder = model_flops(recipe, load)
    num_waits = sum(cost.number for (kind, *_), cost in found.items() if kind == "wait")
    console.print(
        f"a step: {total * 1e3:.0f} ms; MFU: {alone / total / chip.peak_flops:.1%} of the model's FLOPs, "
        f"{with_encoder / total / chip.peak_flops:.1%} with the encoder's; times that the host waits: {num_waits}"
    )


def as_table(title: str, rows: dict[str, Cost], total: float) -> Table:
    """Returns a table of costs, as times and as fractions of a step."""
    table = Table(title=title)
    for heading in ("", "ms", "of the step", "number"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, cost in rows.items():
        table.add_row(name, f"{cost.seconds * 1e3:.1f}", f"{cost.seconds / total:.1%}", f"{cost.number:,.0f}")
    return table


if __name__ == "__main__":
    run(main)
