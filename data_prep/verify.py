"""Re-read every byte of a shard directory and name what is damaged: `python -m data_prep.verify --help`.

    listings  are as they were written, list the same shards, and the folder holds no others       listings
    read      one Ray task a shard: sidecar, samples, tar                                          verify_shard
    compare   the sidecars give manifest.json, index.json and the refused rows again               output

What is named is repaired by deleting it and running the same `make shards` again, which keeps all that verifies.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.console import UsageError, build_console, run
from common.files import Location, file_sizes, open_location, read_whole
from data_prep import listings
from data_prep.listings import DIFFERS, UNSEALED, Listings, Manifest, inspect_listings
from data_prep.output import build_index, build_manifest, reject_line
from data_prep.reporting import Work, run_shown
from data_prep.shard_task import ShardSummary
from data_prep.verify_shard import MISSING, Problem, Verdict, VerifyTask, shorten, verify_shard

AGAIN = "run the same `make shards` again"
OLD = "is of a version that has no checksums of itself and the other listings, so damage in these would not show"


def main(
    out: Annotated[str, typer.Argument(help="the shard directory: a folder or a URL such as s3://bucket/shards")],
    workers: Annotated[int | None, typer.Option(help="shards at a time; default: every CPU")] = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster: auto, ray://host:10001; default: local")] = None,
) -> None:
    """Re-read every byte of a shard directory and name what is damaged."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    verify_shards(out, workers, address)


def verify_shards(out: str | Path, workers: int | None = None, address: str | None = None) -> dict[str, Any]:
    """Returns the manifest of a shard directory in which every byte is as it was written; shows what is not.

    Raises:
        ValueError: Something is not, or the directory is not finished.
    """
    console, folder = build_console(stderr=True), open_location(out)
    listed, damage = inspect_listings(folder)
    present = {} if str(folder).startswith("http") else file_sizes(folder)  # web servers list nothing, or refuse to
    found = [*check_listings(folder, listed.manifest, damage), *unlisted(present, listed.manifest)]
    show(found, console)
    verdicts = read_shards(build_tasks(folder, listed), present, console, workers, address)
    summaries = sorted(verdict.summary for verdict in verdicts if verdict.summary)
    is_whole = len(summaries) == len(verdicts) and listed.manifest.version > 1  # else a repair writes these anew
    compared = compare(listed, summaries) if is_whole else []
    compared = shorten([*compared, *check_rejects(folder, listed.manifest, summaries)])
    show(compared, console)
    found += [*compared, *(problem for verdict in verdicts for problem in verdict.problems)]
    if found:
        count, num_bad = sum(problem.count for problem in found), sum(bool(verdict.problems) for verdict in verdicts)
        raise ValueError(
            f"{folder}: {count:,} problem{'s' * (count > 1)}, {num_bad:,} of {len(verdicts):,} shards damaged; "
            f"delete the files named above and {AGAIN}: it writes these alone"
        )
    text = f"{listed.manifest.num_samples:,} samples in {len(verdicts):,} shards, every byte as it was written"
    console.print(text)
    return listed.manifest.model_dump(exclude_unset=True)


def check_listings(folder: Location, manifest: Manifest, damage: dict[str, str]) -> Iterator[Problem]:
    """Yields what is wrong with listings that can be read: `damage`, an old version, a plan.json that is another."""
    yield from (Problem(name, what) for name, what in damage.items())
    if manifest.version == 1:
        yield Problem("manifest.json", OLD)
    try:
        data = read_whole(folder / "plan.json")
    except FileNotFoundError:
        yield Problem("plan.json", MISSING)
        return
    if manifest.version > 1 and not listings.is_sealed(data):
        yield Problem("plan.json", UNSEALED)
    elif manifest.identity_sha256 is not None and _identity_digest(data) != manifest.identity_sha256:
        yield Problem("plan.json", "is not that of these shards")


def _identity_digest(plan: bytes) -> str | None:
    """Returns the digest of what a plan is of; None if it does not say."""
    try:
        return listings.identity_digest(json.loads(plan)["identity"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def unlisted(present: Iterable[str], manifest: Manifest) -> Iterator[Problem]:
    """Yields the files that a reader could take for shards; what other tools keep here is theirs."""
    known = {name for shard in manifest.shards for name in (shard.tar, shard.sidecar)}
    for name in sorted(present):
        if name.endswith(".part"):
            yield Problem(name, "was left by a run that was stopped")
        elif name not in known and (name.endswith(".tar") or re.fullmatch(r"shard-\d+\.json", name)):
            yield Problem(name, "does not belong here, manifest.json does not list it")


def build_tasks(folder: Location, listed: Listings) -> list[VerifyTask]:
    """Returns the task of each shard; version 1 has the checksums of sidecars in index.json alone."""
    told = {shard.raw_data.basename: shard.raw_meta.hashes["sha256"] for shard in listed.index.shards}
    return [VerifyTask(folder, it, it.sidecar_sha256 or told.get(it.tar)) for it in listed.manifest.shards]


def read_shards(
    tasks: list[VerifyTask], present: Iterable[str], console: Console, workers: int | None, address: str | None
) -> list[Verdict]:
    """Returns what was found in each shard, after showing it, as shards are read."""
    verdicts, total = [], sum(task.shard.bytes for task in tasks)
    work = Work("read ", total, len(tasks), lambda verdict: verdict.num_bytes, "MB/s", 1e6)
    with closing(run_shown(verify_shard, tasks, work, console, workers, address)) as found:
        for verdict in found:
            for problem in verdict.problems:
                if problem.what.startswith(MISSING) and problem.file in present:
                    raise ValueError(f"a worker does not see {problem.file}; every machine must see {tasks[0].folder}")
            show(verdict.problems, console)
            verdicts.append(verdict)
    return verdicts


def compare(listed: Listings, summaries: list[ShardSummary]) -> Iterator[Problem]:
    """Yields each value of the manifest and the index that is not what the sidecars give."""
    manifest, index = (listing.model_dump() for listing in listed)
    num_rows = sum(summary.num_samples for summary in summaries) + manifest["num_rejected"]
    expected = {
        "manifest.json": (manifest, build_manifest(summaries, num_rows, manifest["num_rejected"])),
        "index.json": (index, build_index(summaries, listed.manifest.settings.shard_bytes)),
    }
    for file, (found, given) in expected.items():
        values = dict(_leaves(found))
        for name, value in _leaves(given):
            if values.get(name) != value:
                yield Problem(file, f"{name} is {values.get(name, 'missing')}, the shards give {value}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values in a listing by name; that of a shard's begins with its tar."""
    for key, inner in value.items():
        if key == "shards":
            inner = {shard.get("tar") or shard["raw_data"]["basename"]: shard for shard in inner}
        inside = f"{name} {key}".strip()
        yield from _leaves(inner, inside) if isinstance(inner, dict) else [(inside, inner)]


def check_rejects(folder: Location, manifest: Manifest, summaries: Iterable[ShardSummary]) -> Iterator[Problem]:
    """Yields that rejects.jsonl is not as it was written, or what it and the sidecars say differently."""
    try:
        data = read_whole(folder / "rejects.jsonl")
    except FileNotFoundError:
        yield Problem("rejects.jsonl", MISSING)
        return
    if listings.file_digest(data) != manifest.rejects:
        yield Problem("rejects.jsonl", DIFFERS)
        return
    lines = data.splitlines(keepends=True)
    if len(lines) != manifest.num_rejected:
        yield Problem("rejects.jsonl", f"holds {len(lines):,} rows, manifest.json counts {manifest.num_rejected:,}")
    known = {*lines}
    for summary in summaries:
        for reject in summary.rejects:
            if reject_line(reject, manifest.sources.data.name) not in known:
                what = f"does not agree with {summary.name}.json on record {reject.id} (index {reject.index})"
                yield Problem("rejects.jsonl", what)


def show(problems: Iterable[Problem], console: Console) -> None:
    """Prints a line for each problem."""
    for problem in problems:
        console.print(str(problem))


if __name__ == "__main__":
    run(main)
