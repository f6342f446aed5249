"""What planning costs at full size: `--dry-run` of rows like LLaVA's 665,298, their images in a folder or in one zip.

The rows are generated: as many of each source as `llava_v1_5_mix665k.json` has, about 1 GB in all, several questions a
row. Every row has an image of its own (the real set repeats some, so this is the harder case). The images are empty,
because planning looks at their names and sizes alone; in a zip it does so in the zip's directory, which stays in memory
and counts. Each plan is made in a process of its own, and weighed by its peak resident memory.
"""

import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.shards.inputs import write_rows
from benchmarks.shards.measure import Figure, at_most, peak_bytes, report, run_fresh
from data_prep.plan import Settings
from data_prep.shards import show_plan

MIX = {
    "coco/train2017/{:012d}.jpg": 364_100,
    "vg/VG_100K/{}.jpg": 86_417,
    "ocr_vqa/images/{:010d}.jpg": 80_000,
    "gqa/images/{}.jpg": 72_140,
    "textvqa/train_images/{:016x}.jpg": 21_953,
    None: 40_688,
}
"""Rows by the path of their image; None: text only. Source: LLaVA-1.5's instruction data, 665,298 rows in all."""
MAX_BYTES_PER_SAMPLE = 400


def main(
    fraction: Annotated[float, typer.Option(help="of the 665,298 rows")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """Time and peak memory of the plan of 665,298 rows."""
    with tempfile.TemporaryDirectory() as name:
        folder, paths = Path(name), image_paths(fraction)
        num_rows = write_rows(folder / "rows.json", paths, mean_questions=4)
        write_images(folder / "images", [path for path in paths if path])
        write_zip(folder / "images.zip", [path for path in paths if path])
        figures = [Figure("rows", num_rows), Figure("JSON", (folder / "rows.json").stat().st_size / 1e6, "MB")]
        for images in ("images", "images.zip"):
            seconds, before, peak = run_fresh(plan, folder / "rows.json", folder / images)
            per_sample = (peak - before) / num_rows
            figures += [
                Figure(f"{images}: time", seconds, "s"),
                Figure(f"{images}: peak memory", peak / 1e6, "MB"),
                Figure(f"{images}: of it before any input", before / 1e6, "MB"),
                at_most(f"{images}: memory of a sample", per_sample, MAX_BYTES_PER_SAMPLE, "bytes"),
            ]
    report("plan", figures, json_file)


def image_paths(fraction: float) -> list[str | None]:
    """Returns the image path of each row, mixed as in the real set."""
    paths = [
        pattern and pattern.format(number)
        for pattern, count in MIX.items()
        for number in range(round(count * fraction))
    ]
    random.Random(0).shuffle(paths)
    return paths


def write_images(folder: Path, names: list[str]) -> None:
    """Writes empty files."""
    for parent in {Path(name).parent for name in names}:
        (folder / parent).mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def write_zip(archive: Path, names: list[str]) -> None:
    """Writes a zip of empty members."""
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), b"")


def plan(data: Path, images: Path) -> tuple[float, int, int]:
    """Returns the seconds of a dry run, and the peak memory before and after it."""
    before, started = peak_bytes(), time.perf_counter()
    show_plan(data, images, Settings())
    return time.perf_counter() - started, before, peak_bytes()
