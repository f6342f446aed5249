"""LLaVA JSON and images in, verified WebDataset shards out: `python -m data_prep.shards --help`.

    scan      check every row, find every image                                source, json_rows, records, image_roots
    plan      shuffle by seed, cut by bytes                                     plan
    write     one Ray task a shard: decode every image, write tar and sidecar   runner, shard_task, image_check
    finalize  rejects.jsonl, index.json, and last of all manifest.json          output

The same input and settings give the same bytes whatever the number of workers. A run that was stopped is finished by
the same command; what is there already is verified, not trusted.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.console import UsageError, build_console, count_text, run
from common.files import Location, locked, open_location
from common.version import code_version
from data_prep import output
from data_prep.plan import Plan, Settings, build_plan, identity, sample_key, shard_name
from data_prep.records import check_row
from data_prep.reporting import RejectLog, Work, notes_text, plan_text, run_shown, summary_text
from data_prep.shard_task import PlannedRow, ShardTask, write_shard
from data_prep.sidecars import ShardSummary
from data_prep.source import Source, open_source
from data_prep.special_tokens import read_special_tokens

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_SHARDS = 1_000_000


def main(
    data: Annotated[
        str, typer.Option(help="rows: .json array, .jsonl, .parquet, or a folder of .parquet or .arrow; or a URL")
    ],
    out: Annotated[
        str, typer.Option(help="the shard directory to write: a folder or a URL such as s3://bucket/shards")
    ],
    images: Annotated[
        list[str] | None, typer.Option(help="folder, zip or URL of the images; name=location for paths name/...")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="shards at a time; default: every CPU")] = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster: auto, ray://host:10001; default: local")] = None,
    shard_bytes: Annotated[str, typer.Option(help="size to fill a shard to: 256MB, 1GiB or a number")] = "256MB",
    seed: Annotated[int, typer.Option(help="of the shuffle")] = 0,
    shuffle: Annotated[bool, typer.Option(help="mix the rows over all shards")] = True,
    deduplicate: Annotated[bool, typer.Option(help="refuse rows that say the same about the same images")] = False,
    check: Annotated[str, typer.Option(help="decode: every image in full; header: what it is and its size")] = "decode",
    resize_longest: Annotated[int | None, typer.Option(help="shrink images with a longer side, in pixels")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="stop when more of the rows are refused")] = 0.01,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of a tokenizer: note texts that spell its specials")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="check the rows, find the images, and write nothing")] = False,
) -> None:
    """Write WebDataset shards from LLaVA rows and their images."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    if not 0 <= max_bad_fraction <= 1:
        raise UsageError(f"--max-bad-fraction {max_bad_fraction} must lie between 0 and 1")
    settings = Settings(parse_bytes(shard_bytes), seed, shuffle, check, resize_longest, deduplicate)
    if dry_run:
        show_plan(data, images or (), settings, max_bad_fraction, tokenizer)
    else:
        try:
            make_shards(data, images or (), out, settings, workers, address, max_bad_fraction, tokenizer)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise


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


def show_plan(
    data: str | Path,
    images: str | Path | Sequence[str | Path],
    settings: Settings,
    max_bad_fraction: float = 0.01,
    tokenizer: Path | None = None,
) -> Plan:
    """Returns the plan that a run would follow, and shows what it would refuse before it reads an image."""
    console, tokens = build_console(stderr=True), read_special_tokens(tokenizer) if tokenizer else ()
    with open_source(data, images, settings, console, keep_images=False, special_tokens=tokens) as source:
        reject_log = RejectLog(source.name, source.scan.num_rows, max_bad_fraction, console, source.place)
        try:
            reject_log.add(source.scan.rejects)
        finally:
            reject_log.show_table()
        plan = build_plan(source.scan, settings)
        if notes := notes_text(source.scan.notes, Counter()):
            console.print(notes)
        console.print(plan_text(source.scan.num_rows, plan, sum(source.scan.sample_bytes)))
        return plan


def make_shards(
    data: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: Settings,
    workers: int | None = None,
    address: str | None = None,
    max_bad_fraction: float = 0.01,
    tokenizer: Path | None = None,
) -> dict:
    """Returns the manifest of the shard directory `out`, which is complete when this returns.

    Raises:
        ValueError: The input is unreadable, too much of it is bad, or `out` holds something else.
    """
    started, console = time.monotonic(), build_console(stderr=True)
    folder, tokens = open_location(out), read_special_tokens(tokenizer) if tokenizer else ()
    with open_source(data, images, settings, console, special_tokens=tokens) as source:
        same = identity(source.scan, settings, source.description["data"]["sha256"])
        plan = {"identity": same, "modified_sha256": source.scan.modified_sha256}
        origin = {"settings": asdict(settings), "sources": source.description, "code": code_version()}
        if manifest := output.finished(folder, plan):
            console.print(f"{folder} is complete and was made from this input: nothing to do")
            return manifest
        check_spool(source, address)
        with locked(folder):
            reject_log = RejectLog(source.name, source.scan.num_rows, max_bad_fraction, console, source.place)
            recheck = output.prepare(folder, plan)
            summaries = _write_all(source, folder, settings, recheck, reject_log, workers, address)
            output.write_plan(folder, plan)
            manifest = output.finalize(folder, plan, summaries, source.scan, origin)
    reject_log.show_table()
    num_kept = sum(not summary.is_new for summary in summaries)
    text = summary_text(manifest, num_kept, time.monotonic() - started, folder)
    formats = sum((Counter(dict(summary.formats)) for summary in summaries), Counter())
    if notes := notes_text(source.scan.notes, formats):
        console.print(notes)
    console.print(text)
    return manifest


def check_spool(source: Source, address: str | None) -> None:
    """Makes sure that other machines may see images that came inside the rows.

    Raises:
        UsageError: They lie where only this machine looks.
    """
    if address and source.tables and "TMPDIR" not in os.environ:
        raise UsageError(f"--address with images inside {source.name}: set TMPDIR to a folder that every machine sees")


def _write_all(
    source: Source,
    folder: Location,
    settings: Settings,
    recheck: bool,
    reject_log: RejectLog,
    workers: int | None,
    address: str | None,
) -> list[ShardSummary]:
    """Returns the summaries of all shards; leaves rejects.jsonl and a table of reasons where it cannot go on."""
    try:
        reject_log.add(source.scan.rejects)
        plan = build_plan(source.scan, settings)
        if len(plan.shards) > MAX_SHARDS:
            raise UsageError(
                f"--shard-bytes {settings.shard_bytes} makes {count_text(len(plan.shards), 'shard')}, too many"
            )
        tasks = build_tasks(source, folder, settings, plan, recheck)
        summaries = write_shards(tasks, plan, reject_log, workers, address)
        if not any(summary.num_samples for summary in summaries):
            raise ValueError(f"{source.name}: every row was refused, so there is nothing to write")
        return summaries
    except ValueError:
        output.write_rejects(folder, reject_log.rejects, source.name)
        reject_log.show_table()
        raise


def build_tasks(source: Source, folder: Location, settings: Settings, plan: Plan, recheck: bool) -> Iterator[ShardTask]:
    """Yields the task of each shard, with its own rows and the places of its own images, and no others."""
    scan = source.scan
    with source.rows.open("rb") as file:
        for number, positions in enumerate(plan.shards):
            rows = []
            for position in positions:
                row = plan.order[position]
                file.seek(scan.offsets[row])
                text = file.read(scan.row_bytes[row])
                found = [source.find(scan.indices[row], path) for path in check_row(json.loads(text)).paths]
                entries = tuple(entry for entry in found if entry)
                if len(entries) < len(found):
                    raise ValueError(f"{source.name}: an image of row {scan.indices[row]} vanished during the run")
                rows.append(PlannedRow(sample_key(position), scan.indices[row], text, entries))
            yield ShardTask(shard_name(number), folder, rows, settings, recheck)


def write_shards(
    tasks: Iterable[ShardTask], plan: Plan, reject_log: RejectLog, workers: int | None, address: str | None
) -> list[ShardSummary]:
    """Returns the summaries of all shards, written or found whole, showing rate and time left."""
    work = Work("write", len(plan.order), len(plan.shards), lambda summary: summary.num_samples + len(summary.rejects))
    summaries = []
    with closing(run_shown(write_shard, tasks, work, reject_log.console, workers, address)) as written:
        for summary in written:
            summaries.append(summary)
            reject_log.add(summary.rejects)
    return summaries


if __name__ == "__main__":
    run(main)
