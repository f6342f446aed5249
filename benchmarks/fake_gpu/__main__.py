"""Traces one training step of a recipe on a fake GPU and prints what it does: memory, host waits, copies, collectives.

python -m benchmarks.fake_gpu --config configs/saisa-vicuna-7b-stage2.yaml --world 8
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, get_args

from rich.table import Table
from typer import Argument, Option

from benchmarks.fake_gpu.traces import Case, Kind, Load, trace_all
from common.console import build_console, run
from pipeline.config import load_config

GB = 1e9


def main(
    config: Annotated[Path, Option(help="the recipe")],
    world: Annotated[int, Option(help="processes", min=1)] = 8,
    rank: Annotated[int, Option(help="which of them is traced", min=0)] = 0,
    packs: Annotated[int, Option(help="packs of a process", min=1)] = 1,
    samples: Annotated[int, Option(help="samples of a pack", min=1)] = 16,
    text: Annotated[int, Option(help="text tokens of a sample", min=1)] = 256,
    images: Annotated[int, Option(help="images of a sample", min=0)] = 1,
    overrides: Annotated[list[str] | None, Argument(help="settings of the recipe, as section.key=value")] = None,
) -> None:
    """Traces a training step on a GPU that is not there."""
    load_config(config, [*(overrides or ())])  # a mistake in it is told at once
    load = Load(num_packs=packs, num_samples=samples, num_text=text, num_images=images)
    [trace] = trace_all([Case(config, tuple(overrides or ()), load, world, rank)])
    console = build_console()
    console.print(
        f"bytes: {trace.start_bytes / GB:.1f}e9 at the start, {trace.resident_bytes / GB:.1f}e9 between steps, "
        f"{trace.peak_bytes / GB:.1f}e9 at the peak of a step ({trace.peak_at})"
    )
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for event in trace.events:
        counts[event.kind, event.name, event.source] += 1
        sizes[event.kind, event.name, event.source] += event.num_bytes
    for kind in get_args(Kind):
        table = Table(title=f"{kind}: {sum(count for (of, *_), count in counts.items() if of == kind):,}")
        for heading in ("times", "bytes", "what", "asked for by"):
            table.add_column(heading, justify="right" if heading in ("times", "bytes") else "left")
        for (of, name, source), count in counts.most_common():
            if of == kind:
                table.add_row(f"{count:,}", f"{sizes[of, name, source]:,}", name, source)
        console.print(table)


if __name__ == "__main__":
    run(main)
