"""What the tests of traced steps have in common."""

from collections.abc import Set
from pathlib import Path

from benchmarks.fake_gpu.traces import Trace

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGE1, STAGE2 = (CONFIGS / f"saisa-vicuna-7b-stage{number}.yaml" for number in (1, 2))


def shared_collectives(trace: Trace, ranks: Set[int]) -> list[tuple[str, tuple[int, ...], int]]:
    """Returns the collectives of groups that have all `ranks`, in order: name, group and bytes."""
    return [
        (event.name, event.ranks, event.num_bytes)
        for event in trace.events
        if event.kind == "collective" and ranks <= set(event.ranks) and event.name not in ("send", "recv")
    ]
