"""LLaVA JSON and images in, verified WebDataset shards out: `python -m data_prep.shards --help`.

    scan      check every row, find every image                                json_rows, records, images
    plan      shuffle by seed, cut by bytes                                     plan
    write     one Ray task a shard: decode every image, write tar and sidecar   runner, shard_task, tar_writer
    finalize  rejects.jsonl, index.json, and last of all manifest.json          output

The same input and settings give the same bytes whatever the number of workers. A run that was stopped is finished by
the same command; what is there already is verified, not trusted.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep import output
from data_prep.console import UsageError, run
from data_prep.images import ImageDirectory, open_images
from data_prep.json_rows import Row, read_rows
from data_prep.plan import Plan, Scan, Settings, build_plan, identity, sample_key, scan_rows, shard_name
from data_prep.records import check_row
from data_prep.reporting import Ledger, build_progress, summary_text
from data_prep.runner import ray_session, run_tasks
from data_prep.shard_task import PlannedRow, ShardSummary, ShardTask

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_SHARDS = 1_000_000


def main(
    data: Annotated[Path, typer.Option(help="LLaVA rows: a .json array or .jsonl")],
    images: Annotated[Path, typer.Option(help="the folder or the zip that image paths are relative to")],
    out: Annotated[Path, typer.Option(help="the shard directory to write")],
    workers: Annotated[int | None, typer.Option(help="shards at a time; default: every CPU")] = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster: auto, ray://host:10001; default: local")] = None,
    shard_bytes: Annotated[str, typer.Option(help="size to fill a shard to: 256MB, 1GiB or a number")] = "256MB",
    seed: Annotated[int, typer.Option(help="of the shuffle")] = 0,
    shuffle: Annotated[bool, typer.Option(help="mix the rows over all shards")] = True,
    max_bad_fraction: Annotated[float, typer.Option(help="stop when more of the rows are refused")] = 0.01,
) -> None:
    """Write WebDataset shards from LLaVA rows and their images."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    if not 0 <= max_bad_fraction <= 1:
        raise UsageError(f"--max-bad-fraction {max_bad_fraction} must lie between 0 and 1")
    if seed < 0:
        raise UsageError(f"--seed {seed} must not be negative")
    settings = Settings(parse_bytes(shard_bytes), seed, shuffle)
    make_shards(data, images, out, settings, workers, address, max_bad_fraction)


def parse_bytes(text: str) -> int:
    """Returns the bytes that e.g. `256MB`, `1GiB` or `1000` means.

    Raises:
        UsageError: It means nothing, or not a positive number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    num_bytes = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if num_bytes < 1:
        raise UsageError(f"--shard-bytes {text!r} is not a size; use e.g. 256MB, 1GiB or 1000000")
    return num_bytes


def make_shards(
    data: Path,
    images: Path,
    out: Path,
    settings: Settings,
    workers: int | None = None,
    address: str | None = None,
    max_bad_fraction: float = 0.01,
) -> dict:
    """Returns the manifest of the shard directory `out`, which is complete when this returns.

    Raises:
        ValueError: The input is unreadable, too much of it is bad, or `out` holds something else.
    """
    started, console = time.monotonic(), Console(stderr=True, soft_wrap=True)
    directory = open_images(images)
    scan = scan_source(data, directory, console)
    sources = {
        "data": {"name": data.name, "bytes": data.stat().st_size, "sha256": _sha256(data)},
        "images": {"name": images.name, "sha256": scan.images_sha256, "hashed": "paths and sizes, in row order"},
    }
    plan_identity = identity(scan, settings, sources["data"]["sha256"])
    if manifest := output.finished(out, plan_identity, scan.modified_sha256):
        console.print(f"{out} is complete and was made from this input: nothing to do")
        return manifest
    recheck = output.prepare(out, plan_identity, scan.modified_sha256)
    ledger = Ledger(data.name, scan.num_rows, max_bad_fraction, console)
    try:
        ledger.enter(scan.rejects)
        plan = build_plan(scan, settings)
        if len(plan.shards) > MAX_SHARDS:
            raise UsageError(f"--shard-bytes {settings.shard_bytes} makes {len(plan.shards):,} shards, too many")
        tasks = build_tasks(data, directory, out.resolve(), scan, plan, recheck)
        summaries = write_shards(tasks, plan, ledger, workers, address)
        if not any(summary.num_samples for summary in summaries):
            raise ValueError(f"{data}: every row was refused, so there is nothing to write")
    except ValueError:
        output.write_rejects(out, ledger.rejects, data.name)
        ledger.show_table()
        raise
    if recheck:
        output.write_plan(out, plan_identity, scan.modified_sha256)
    manifest = output.finalize(out, summaries, scan, settings, sources)
    ledger.show_table()
    num_kept = sum(not summary.is_new for summary in summaries)
    text = summary_text(manifest, num_kept, time.monotonic() - started, out)
    console.print(text, highlight=False, markup=False)
    return manifest


def scan_source(data: Path, directory: ImageDirectory, console: Console) -> Scan:
    """Returns the checked rows of `data`, showing how far it has got."""
    started, total = time.monotonic(), data.stat().st_size
    with build_progress(console) as progress:
        bar = progress.add_task("scan ", total=total, note="")

        def watched() -> Iterator[Row]:
            for row in read_rows(data):
                yield row
                if row.index % 1000 == 999:
                    rate = (row.index + 1) / (time.monotonic() - started)
                    progress.update(bar, completed=row.offset, note=f"{row.index + 1:,} rows, {rate:,.0f}/s")
            progress.update(bar, completed=total)

        return scan_rows(watched(), directory.find)


def build_tasks(
    data: Path, directory: ImageDirectory, out: Path, scan: Scan, plan: Plan, recheck: bool
) -> Iterator[ShardTask]:
    """Yields the task of each shard, with its own rows and the places of its own images, and no others."""
    with data.open("rb") as file:
        for number, places in enumerate(plan.shards):
            rows = []
            for place in places:
                row = plan.order[place]
                file.seek(scan.offsets[row])
                text = file.read(scan.row_bytes[row])
                found = [directory.find(path) for path in check_row(json.loads(text))]
                entries = tuple(entry for entry in found if entry)
                if len(entries) < len(found):
                    raise ValueError(f"{data}: an image of row {scan.indices[row]} vanished while it was being sharded")
                rows.append(PlannedRow(sample_key(place), scan.indices[row], text, entries))
            yield ShardTask(shard_name(number), out, rows, recheck)


def write_shards(
    tasks: Iterable[ShardTask], plan: Plan, ledger: Ledger, workers: int | None, address: str | None
) -> list[ShardSummary]:
    """Returns the summaries of all shards, written or found whole, showing rate and time left."""
    summaries, num_done, num_shards = [], 0, len(plan.shards)
    with ray_session(address, workers) as in_flight, build_progress(ledger.console) as progress:
        started, bar = time.monotonic(), progress.add_task("write", total=len(plan.order), note="")
        for summary in run_tasks(tasks, in_flight):
            summaries.append(summary)
            num_done += summary.num_samples + len(summary.rejects)
            rate = num_done / (time.monotonic() - started)
            note = f"{len(summaries):,} of {num_shards:,} shards, {rate:,.0f} samples/s"
            progress.update(bar, completed=num_done, note=note)
            ledger.enter(summary.rejects)
    return summaries


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
