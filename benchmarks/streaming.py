"""Samples per second of one process, read but not decoded: ours in random order against webdataset and streaming.

    python -m benchmarks.streaming

- Ours gives every member of every sample, by number, in the order of an epoch, each checked against its CRC-32.
- webdataset reads the same tars from front to back and checks nothing.
- mosaicml-streaming reads the same samples from MDS shards of the same size, shuffled as it does by default.

All files are in the page cache; opening the data sets is not timed.
"""

import tempfile
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from streaming import MDSWriter, StreamingDataset
from webdataset.compat import WebDataset

from benchmarks.shards.inputs import write_data_set
from benchmarks.shards.measure import Figure, at_least, median_ratio, report, time_rounds
from common.console import run
from data_prep.plan import Settings
from data_prep.shards import make_shards
from pipeline.data.order import Source, order
from pipeline.shards.shard_set import ShardSet

OVER_WEBDATASET, OVER_STREAMING = 1.2, 1.3
PHOTO = 640, 480


def read_ours(shards: ShardSet) -> Callable[[Path], None]:
    """Returns a run over a new epoch of a shard set."""
    epochs = count()

    def read(_: Path) -> None:
        for number in order(0, next(epochs), [Source(tuple(shards.shard_sizes))], 32).tolist():
            shards.members(number)

    return read


def read_all(dataset: Iterable[Any], num_samples: int) -> Callable[[Path], None]:
    """Returns a run over a data set, of which every iteration is an epoch."""

    def read(_: Path) -> None:
        found = sum(1 for _ in dataset)
        assert found == num_samples, f"{found} of {num_samples} samples came"

    return read


def write_mds(shards: ShardSet, folder: Path, shard_bytes: int) -> StreamingDataset:
    """Returns the samples of a shard set (one JPEG each) as MDS shards."""
    columns = {"json": "bytes", "jpg": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes, progress_bar=False) as writer:
        for number in range(len(shards)):
            writer.write(shards.members(number))
    return StreamingDataset(local=str(folder), shuffle=True, batch_size=1)


def main(
    num_samples: Annotated[int, typer.Option(help="photos to read")] = 10_000,
    num_tars: Annotated[int, typer.Option(help="tars they are in")] = 40,
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Measure reading."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, images, num_bytes = write_data_set(folder, [PHOTO] * num_samples)
        shard_bytes = num_bytes // num_tars
        make_shards(data, images, folder / "shards", Settings(shard_bytes=shard_bytes, check="header"))
        shards, tars = ShardSet(folder / "shards"), sorted(map(str, (folder / "shards").glob("*.tar")))
        runs = {
            "ours": read_ours(shards),
            "webdataset": read_all(WebDataset(tars, shardshuffle=False), num_samples),
            "streaming": read_all(write_mds(shards, folder / "mds", shard_bytes), num_samples),
        }
        seconds = time_rounds(runs, sorted(folder.glob("*/*.tar")), folder / "nothing", rounds)
    report(
        "reading",
        [
            *(Figure(name, num_samples / median(times), "samples/s") for name, times in seconds.items()),
            at_least("ours / webdataset", median_ratio(seconds["webdataset"], seconds["ours"]), OVER_WEBDATASET),
            at_least("ours / streaming", median_ratio(seconds["streaming"], seconds["ours"]), OVER_STREAMING),
        ],
        json_file,
    )


if __name__ == "__main__":
    run(main)
