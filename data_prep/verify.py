"""Re-read every byte of a shard directory and name what is damaged: `python -m data_prep.verify --help`.

    listings  manifest.json and index.json list the same shards, and the folder holds no others
    read      one Ray task a shard: sidecar, samples, tar                             verify_shard
    compare   the sidecars give manifest.json and index.json again                    output
    rejects   rejects.jsonl has the SHA-256 in manifest.json, and a line for all that a sidecar refused

What is named is repaired by deleting it and running the same `make shards` again, which keeps all that verifies.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.console import UsageError, build_console, run
from common.files import Location, file_sizes, open_location, read_whole
from data_prep.output import build_index, build_manifest, reject_line
from data_prep.plan import Settings
from data_prep.reporting import build_task_progress
from data_prep.runner import ray_session, run_tasks
from data_prep.shard_task import ShardSummary
from data_prep.verify_shard import MISSING, Problem, Verdict, VerifyTask, open_buffered, shorten, verify_shard

AGAIN = "run the same `make shards` again"


def main(
    out: Annotated[str, typer.Argument(help="the shard directory: a folder or a URL such as s3://bucket/shards")],
    workers: Annotated[int | None, typer.Option(help="shards at a time; default: every CPU")] = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster: auto, ray://host:10001; default: local")] = None,
) -> None:
    """Re-read every byte of a shard directory and name what is damaged."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    verify_shards(out, workers, address)


def verify_shards(out: str | Path, workers: int | None = None, address: str | None = None) -> dict:
    """Returns the manifest of a shard directory in which every byte is as it was written; shows what is not.

    Raises:
        ValueError: Something is not, or the directory is not finished.
    """
    console, folder = build_console(stderr=True), open_location(out)
    listings = read_listings(folder)
    present = {} if str(folder).startswith("http") else file_sizes(folder)  # web servers list nothing, or refuse to
    found = list(unlisted(present, listings.tasks))
    show(found, console)
    verdicts = read_shards(listings.tasks, folder, present, console, workers, address)
    summaries = sorted(verdict.summary for verdict in verdicts if verdict.summary)
    compared = [] if len(summaries) < len(verdicts) else compare(listings, summaries)  # a repair writes these anew
    compared = shorten([*compared, *check_rejects(folder, listings, summaries)])
    show(compared, console)
    found += [*compared, *(problem for verdict in verdicts for problem in verdict.problems)]
    if found:
        count, num_bad = sum(problem.count for problem in found), sum(bool(verdict.problems) for verdict in verdicts)
        raise ValueError(
            f"{folder}: {count:,} problem{'s' * (count > 1)}, {num_bad:,} of {len(verdicts):,} shards damaged; "
            f"delete the files named above and {AGAIN}: it writes these alone"
        )
    manifest = listings.manifest
    text = f"{manifest['num_samples']:,} samples in {len(verdicts):,} shards, every byte as it was written"
    console.print(text)
    return manifest


@dataclass(frozen=True)
class Listings:
    """What the finished directory says of itself, and the shards to read."""

    manifest: dict
    index: dict
    settings: Settings
    source: str
    num_rejected: int
    rejects: dict
    tasks: list[VerifyTask]


def read_listings(folder: Location) -> Listings:
    """Returns what a finished directory says of itself.

    Raises:
        ValueError: It is not finished, or its listings are too damaged to say which shards there are.
    """
    manifest, index = read_json(folder, "manifest.json"), read_json(folder, "index.json")
    try:
        in_index = {shard["raw_data"]["basename"]: shard for shard in index["shards"]}
        listed = [shard["tar"] for shard in manifest["shards"] if shard["num_samples"]]
        tasks = [build_task(folder, shard, in_index.get(shard["tar"])) for shard in manifest["shards"]]
        settings, source = Settings(**manifest["settings"]), manifest["sources"]["data"]["name"]
        if listed != list(in_index):
            raise ValueError("they list different shards")
        num_rejected, rejects = int(manifest["num_rejected"]), manifest["rejects"]
        listings = Listings(manifest, index, settings, source, num_rejected, rejects, tasks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"manifest.json or index.json is damaged ({error})"
        raise ValueError(f"{folder}: {wrong}; delete both and {AGAIN}: it keeps every shard that verifies") from None
    read_json(folder, "plan.json", "a repair needs it; make the shards again in another folder")
    return listings


def read_json(folder: Location, name: str, way_out: str = "") -> Any:
    """Returns what a status file of a finished directory holds.

    Raises:
        ValueError: The file is missing or is not JSON.
    """
    try:
        return json.loads(read_whole(folder / name))
    except (FileNotFoundError, NotADirectoryError):
        if not any((folder / begun).exists() for begun in ("plan.json", "manifest.json")):
            raise ValueError(f"{folder}: no shards here; name what `make shards` wrote with --out") from None
        raise ValueError(f"{folder} is not finished, it has no {name}; {way_out or AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged ({error}); {way_out or f'delete it and {AGAIN}'}") from None


def build_task(folder: Location, shard: dict, in_index: dict | None) -> VerifyTask:
    """Returns the task of a shard, from its entries in the manifest and, unless every row was refused, the index."""
    sidecar_sha256 = in_index["raw_meta"]["hashes"]["sha256"] if in_index else None
    told = (shard["tar"], shard["sidecar"], shard["bytes"], shard["sha256"])
    return VerifyTask(folder, *told, sidecar_sha256, shard["num_rejected"])


def unlisted(present: Iterable[str], tasks: list[VerifyTask]) -> Iterator[Problem]:
    """Yields the files that a reader could take for shards; what other tools keep here is theirs."""
    known = {name for task in tasks for name in (task.tar, task.sidecar)}
    for name in sorted(present):
        if name.endswith(".part"):
            yield Problem(name, "was left by a run that was stopped")
        elif name not in known and (name.endswith(".tar") or re.fullmatch(r"shard-\d+\.json", name)):
            yield Problem(name, "does not belong here, manifest.json does not list it")


def read_shards(
    tasks: list[VerifyTask],
    folder: Location,
    present: Iterable[str],
    console: Console,
    workers: int | None,
    address: str | None,
) -> list[Verdict]:
    """Returns what was found in each shard, after showing it, as shards are read."""
    verdicts, num_done = [], 0
    with ray_session(address, workers) as in_flight, build_task_progress(console) as progress:
        started, bar = (
            time.monotonic(),
            progress.add_task("read ", total=sum(task.num_bytes for task in tasks), note=""),
        )
        for verdict in run_tasks(verify_shard, tasks, in_flight):
            for problem in verdict.problems:
                if problem.what.startswith(MISSING) and problem.file in present:
                    raise ValueError(f"a worker does not see {folder / problem.file}; every machine must see {folder}")
            show(verdict.problems, console)
            verdicts.append(verdict)
            num_done += verdict.num_bytes
            rate = num_done / 1e6 / (time.monotonic() - started)
            note = f"{len(verdicts):,} of {len(tasks):,} shards, {rate:,.0f} MB/s"
            progress.update(bar, completed=num_done, note=note)
    return verdicts


def compare(listings: Listings, summaries: list[ShardSummary]) -> Iterator[Problem]:
    """Yields each value of the manifest and the index that is not what the sidecars give."""
    num_rows = sum(summary.num_samples for summary in summaries) + listings.num_rejected
    manifest = build_manifest(summaries, num_rows, listings.num_rejected)
    yield from differing("manifest.json", by_tar(listings.manifest), by_tar(manifest))
    yield from differing("index.json", by_tar(listings.index), by_tar(build_index(summaries, listings.settings)))


def differing(file: str, found: dict, expected: dict) -> Iterator[Problem]:
    """Yields each value that is not as expected; a finding may hold more than is expected of it."""
    values = dict(_leaves(found))
    for name, value in _leaves(expected):
        if name not in values or values[name] != value:
            yield Problem(file, f"{name} is {values.get(name, 'missing')}, the shards give {value}")


def by_tar(listing: dict) -> dict:
    """Returns a listing with the entry of each shard under the name of its tar."""
    return listing | {
        "shards": {shard.get("tar") or shard["raw_data"]["basename"]: shard for shard in listing["shards"]}
    }


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name} {key}".strip())


def check_rejects(folder: Location, listings: Listings, summaries: Iterable[ShardSummary]) -> Iterator[Problem]:
    """Yields that rejects.jsonl is not as it was written, or what it and the sidecars say differently."""
    wanted = {
        reject_line(reject, listings.source): (summary.name, reject)
        for summary in summaries
        for reject in summary.rejects
    }
    num_lines, num_bytes, sha256 = 0, 0, hashlib.sha256()
    try:
        with open_buffered(folder / "rejects.jsonl") as file:
            for line in file:
                num_lines, num_bytes = num_lines + 1, num_bytes + len(line)
                sha256.update(line)
                wanted.pop(line, None)
    except FileNotFoundError:
        yield Problem("rejects.jsonl", MISSING)
        return
    if listings.rejects != {"bytes": num_bytes, "sha256": sha256.hexdigest()}:
        yield Problem("rejects.jsonl", "its bytes differ from the size and SHA-256 in manifest.json")
        return
    if num_lines != listings.num_rejected:
        yield Problem("rejects.jsonl", f"holds {num_lines:,} rows, manifest.json counts {listings.num_rejected:,}")
    for name, reject in sorted(wanted.values()):
        what = f"does not agree with {name}.json on record {reject.id} (index {reject.index})"
        yield Problem("rejects.jsonl", what)


def show(problems: Iterable[Problem], console: Console) -> None:
    """Prints a line for each problem."""
    for problem in problems:
        console.print(str(problem))


if __name__ == "__main__":
    run(main)
