"""Checking by decoding: `make shards` against a bare loop of Pillow on every core.

The bare rate is the sum over processes, one on each core and all at once, of photos per second of
`Image.open(path)`, `load()` and `convert("RGB")` where it is not. Ours is the whole of `make_shards`, on as many cores,
with Ray running before the clock starts. Photos have the size and weight of COCO's. Ray's workers have niceness 15, so
the bare loop has it too, lest other work on the machine decide.
"""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from PIL import Image

from benchmarks.shards.inputs import COCO, write_data_set
from benchmarks.shards.measure import Figure, at_least, median_ratio, report, time_rounds
from data_prep.plan import Settings
from data_prep.runner import ray_session
from data_prep.shards import make_shards

TARGET = 0.85
PHOTO = 640, 480
RAY_NICENESS = 15


def main(
    num_samples: Annotated[int, typer.Option(help="photos to check")] = 4000,
    num_tars: Annotated[int, typer.Option(help="tars to write them to")] = 16,
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 5,
    cpus: Annotated[int, typer.Option(help="cores to use")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Samples per second with full decoding, against bare Pillow on as many cores."""
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(cpus, spawn, initializer=os.nice, initargs=(RAY_NICENESS,))
    with tempfile.TemporaryDirectory() as folder, ray_session(None, cpus), pool:
        data, images, num_bytes = write_data_set(Path(folder), [PHOTO] * num_samples, COCO)
        files = sorted(images.iterdir())
        rates: list[float] = []

        def bare(_: Path) -> None:
            rates.append(sum(pool.map(decode_rate, (files[core::cpus] for core in range(cpus)))))

        settings = Settings(shard_bytes=num_bytes // num_tars)
        runs = {"ours": lambda out: make_shards(data, images, out, settings), "bare": bare}
        seconds = time_rounds(runs, files, Path(folder), rounds)
    ours, alone = [num_samples / time for time in seconds["ours"]], rates[1:]
    report(
        "decode",
        [
            Figure("ours", median(ours), "samples/s"),
            Figure(f"bare Pillow on {cpus} cores", median(alone), "photos/s"),
            Figure("bytes of a photo", num_bytes / num_samples),
            at_least("ours / bare", median_ratio(ours, alone), TARGET),
        ],
        json_file,
    )


def decode_rate(files: list[Path]) -> float:
    """Returns photos per second of a loop over these files."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            image.load()
            if image.mode != "RGB":
                image.convert("RGB")
    return len(files) / (time.perf_counter() - started)
