"""Writing without decoding: `make shards` against Ray Data and against one process with webdataset.

All three write the same photos and rows, read from a warm page cache, into tars of about the same number.

- Ours is the whole of `make_shards` with `check="header"`: scan, plan, shuffle, headers and checksums of every image,
  SHA-256 of every tar, fsync of every file, sidecars, index and manifest.
- Ray Data gets its fastest way in: rows go in as bytes, images are read in whole batches inside the fused write task
  (`map` row by row and `read_binary_files` are slower), and the encoder is off. It neither checks, hashes nor syncs.
- `webdataset.ShardWriter` is one process that does none of this either.

Ray runs before the clock starts, for both, and has run each of them once.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ray
import ray.data
import typer
from webdataset.writer import ShardWriter

from benchmarks.shards.inputs import write_data_set
from benchmarks.shards.measure import Figure, at_least, median_ratio, report, time_rounds
from data_prep.plan import Settings
from data_prep.shards import make_shards

TARGET = 1.5
PHOTO = 640, 480


def main(
    num_samples: Annotated[int, typer.Option(help="photos to write")] = 10_000,
    num_tars: Annotated[int, typer.Option(help="tars to write them to")] = 16,
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 7,
    cpus: Annotated[int, typer.Option(help="of Ray")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Samples per second without decoding, against Ray Data."""
    with tempfile.TemporaryDirectory() as folder, local_ray(cpus):
        data, images, num_bytes = write_data_set(Path(folder), [PHOTO] * num_samples)
        settings = Settings(shard_bytes=num_bytes // num_tars, check="header")
        seconds = time_rounds(
            {
                "ours": lambda out: make_shards(data, images, out, settings),
                "ray": partial(write_with_ray_data, data, images, num_tars),
                "webdataset": partial(write_with_webdataset, data, images, num_bytes // num_tars),
            },
            list(images.iterdir()),
            Path(folder),
            rounds,
        )
    report(
        "write",
        [
            *(Figure(name, num_samples / median(times), "samples/s") for name, times in seconds.items()),
            Figure("bytes of a photo", num_bytes / num_samples),
            at_least("ours / ray", median_ratio(seconds["ray"], seconds["ours"]), TARGET),
        ],
        json_file,
    )


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray with its default object store, which Ray Data wants; or the one that runs already."""
    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def write_with_ray_data(data: Path, images: Path, num_tars: int, out: Path) -> None:
    """Writes the data set with Ray Data."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = json.loads(data.read_bytes())
    items = [
        {"key": f"{number:09d}", "path": f"{images}/{row['image']}", "json": json.dumps(row).encode()}
        for number, row in enumerate(rows)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=num_tars)
    dataset.map_batches(_with_image, batch_size=None).write_webdataset(str(out), encoder=None)


def _with_image(batch: Any) -> Any:
    jpgs = [Path(path).read_bytes() for path in batch["path"]]
    return {"__key__": batch["key"], "json": batch["json"], "jpg": jpgs}


def write_with_webdataset(data: Path, images: Path, tar_bytes: int, out: Path) -> None:
    """Writes the data set with webdataset's own writer, in this process."""
    out.mkdir()
    with ShardWriter(f"{out}/%06d.tar", maxsize=tar_bytes, verbose=0) as writer:
        for number, row in enumerate(json.loads(data.read_bytes())):
            sample = {"__key__": f"{number:09d}", "json": json.dumps(row).encode()}
            writer.write(sample | {"jpg": (images / row["image"]).read_bytes()})
