"""What `--resize-longest 672` saves: disk, and decoding at every later epoch; and what it costs once.

Photos have a longer side of 1,024 to 2,000 pixels, in landscape, portrait and square, at quality 85. Those that are
written anew have quality 90 (`image_check.JPEG_QUALITY`). Decoding is timed in one process that reads the tars.
"""

import random
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from benchmarks.shards.inputs import write_data_set
from benchmarks.shards.measure import Figure, median_ratio, report, time_rounds
from data_prep.plan import Settings
from data_prep.runner import ray_session
from data_prep.shards import make_shards

RESIZE_LONGEST = 672  # two by two tiles of a 336-pixel encoder
ASPECTS = (4 / 3, 3 / 2, 16 / 9, 1, 3 / 4)


def main(
    num_samples: Annotated[int, typer.Option(help="photos")] = 1000,
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 3,
    cpus: Annotated[int, typer.Option(help="of Ray")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Disk and decoding time saved by --resize-longest 672."""
    with tempfile.TemporaryDirectory() as name, ray_session(None, cpus):
        folder = Path(name)
        data, images, num_bytes = write_data_set(folder, photo_sizes(num_samples))
        manifests: dict[str, dict] = {}

        def write(resize_longest: int | None, out: Path) -> None:
            settings = Settings(shard_bytes=num_bytes // 24, resize_longest=resize_longest)
            manifests[out.name] = make_shards(data, images, out, settings)

        runs = {"kept": partial(write, None), "shrunk": partial(write, RESIZE_LONGEST)}
        writing = time_rounds(runs, list(images.iterdir()), folder, rounds)
        reads = {f"read-{run}": partial(decode_tars, folder / run) for run in runs}
        reading = time_rounds(reads, [tar for run in runs for tar in (folder / run).glob("*.tar")], folder, rounds)
    kept, shrunk = (manifests[run]["num_bytes"] for run in runs)
    report(
        f"shrink to {RESIZE_LONGEST}",
        [
            Figure("bytes of a sample as it came", kept / num_samples),
            Figure("bytes of a sample shrunk", shrunk / num_samples),
            Figure("disk, shrunk / kept", shrunk / kept),
            Figure("decoding time, shrunk / kept", median_ratio(reading["read-shrunk"], reading["read-kept"])),
            Figure("time of make shards, shrunk / kept", median_ratio(writing["shrunk"], writing["kept"])),
        ],
        json_file,
    )


def photo_sizes(num_photos: int) -> list[tuple[int, int]]:
    """Returns width and height of each photo."""
    rng, sizes = random.Random(0), []
    for _ in range(num_photos):
        longest, aspect = rng.randint(1024, 2000), rng.choice(ASPECTS)
        sizes.append((round(longest * min(1, aspect)), round(longest * min(1, 1 / aspect))))
    return sizes


def decode_tars(shards: Path, _: Path) -> None:
    """Decodes every photo in a folder of shards."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file and member.name.endswith(".jpg"):
                    Image.open(file).convert("RGB")
