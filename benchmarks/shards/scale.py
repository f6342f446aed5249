"""Ten times the samples: ten times the time, and memory that hardly grows.

Photos are small (96x72) to keep it to minutes; what they weigh touches no process for longer than one sample. Each run
is a process of its own with a Ray of its own, started and tried on a few samples before the clock starts. Memory is
the peak resident set, which leaves out the page cache.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import typer

from benchmarks.shards.inputs import write_data_set
from benchmarks.shards.measure import Figure, at_most, peak_bytes, report, run_fresh, worker_peak_bytes
from data_prep.plan import Settings
from data_prep.runner import ray_session
from data_prep.shards import make_shards

PHOTO = 96, 72
SHARD_BYTES = 500_000  # many shards a worker at both sizes; with few, the small run mostly waits for its last ones
MAX_DEVIATION = 0.15
MAX_BYTES_PER_SAMPLE = 400


class Cost(NamedTuple):
    """What one run took."""

    seconds: float
    driver_bytes: int
    worker_bytes: int


def main(
    num_samples: Annotated[int, typer.Option(help="samples of the small run; the large one has ten times as many")] = (
        5000
    ),
    rounds: Annotated[int, typer.Option(help="runs of each size")] = 3,
    cpus: Annotated[int, typer.Option(help="of Ray")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Time and peak memory at n and at 10 n samples."""
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), (num_samples, 10 * num_samples)
        for size in (100, *sizes):
            write_data_set(folder / str(size), [PHOTO] * size)
        runs = [[run_fresh(shard, folder, size, number, cpus) for size in sizes] for number in range(rounds)]
    small, large = (Cost(*map(median, zip(*costs, strict=True))) for costs in zip(*runs, strict=True))
    growth = (large.driver_bytes - small.driver_bytes) / (9 * num_samples)
    report(
        "scale",
        [
            *(
                figure
                for size, cost in zip(sizes, (small, large), strict=True)
                for figure in (
                    Figure(f"time of {size:,} samples", cost.seconds, "s"),
                    Figure(f"peak memory of the driver at {size:,}", cost.driver_bytes / 1e6, "MB"),
                    Figure(f"peak memory of a worker at {size:,}", cost.worker_bytes / 1e6, "MB"),
                )
            ),
            at_most("deviation from linear time", abs(large.seconds / small.seconds / 10 - 1), MAX_DEVIATION),
            at_most("memory of planning a sample", growth, MAX_BYTES_PER_SAMPLE, "bytes"),
        ],
        json_file,
    )


def shard(folder: Path, num_samples: int, number: int, cpus: int) -> Cost:
    """Returns what sharding the data set of this size takes in this process and in the workers of its Ray."""
    with ray_session(None, cpus):
        for size in (100, num_samples):
            data, images = folder / str(size) / "rows.json", folder / str(size) / "images"
            started = time.perf_counter()
            make_shards(data, images, folder / f"out-{num_samples}-{number}-{size}", Settings(SHARD_BYTES))
        return Cost(time.perf_counter() - started, peak_bytes(), worker_peak_bytes())
