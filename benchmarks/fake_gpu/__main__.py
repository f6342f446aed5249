"""Traces one training step of a recipe on a fake GPU and prints what it does: memory, host waits, copies, collectives.

python -m benchmarks.fake_gpu --config configs/saisa-vicuna-7b-stage2.yaml --world 8
"""

from collections import Counter
from typing import Annotated, get_args

from rich.table import Table
from typer import Option

from benchmarks.fake_gpu.options import Config, Images, Overrides, Packs, Samples, Text, World, build_load
from benchmarks.fake_gpu.traces import Case, Kind, trace_all
from common.console import UsageError, build_console, run
from pipeline.config import load_config

GB = 1e9


def main(
    config: Config,
    world: World = 8,
    rank: Annotated[int, Option(help="which of them is traced", min=0)] = 0,
    packs: Packs = 1,
    samples: Samples = None,
    text: Text = 256,
    images: Images = 1,
    overrides: Overrides = None,
) -> None:
    """Traces a training step on a GPU that is not there."""
    if rank >= world:
        raise UsageError(f"--rank {rank} is none of --world {world}; use 0 to {world - 1}")
    settings = tuple(overrides or ())
    load = build_load(load_config(config, [*settings]), packs, samples, text, images)
    [trace] = trace_all([Case(config, settings, load, world, rank)])
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
            table.add_column(heading, justify="right" if heading in ("times", "bytes") else "left", overflow="fold")
        for (of, name, source), count in counts.most_common():
            if of == kind:
                table.add_row(f"{count:,}", f"{sizes[of, name, source]:,}", name, source)
        console.print(table)


if __name__ == "__main__":
    run(main)
