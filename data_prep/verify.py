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
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import UsageError, build_console, count_text, run
from common.files import Location, file_sizes, open_location, read_whole
from data_prep import listings
from data_prep.listings import AGAIN, DIFFERS, DIFFERS_FROM_OWN, Damage, Listings, Manifest, inspect_listings
from data_prep.output import build_index, build_manifest
from data_prep.reporting import Work, run_shown
from data_prep.sidecars import ReadTask, ShardSummary
from data_prep.verify_shard import MISSING, Problem, Verdict, naming_damage, shorten, verify_shard

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
    console, folder, found = build_console(stderr=True), open_location(out), []
    listed, damage = inspect_listings(folder)
    manifest, num_shards = listed.manifest, len(listed.manifest.shards)
    present = {} if str(folder).startswith("http") else file_sizes(folder)  # web servers list nothing, or refuse to
    work = Work("read ", sum(it.bytes for it in manifest.shards), num_shards, attrgetter("num_bytes"), "MB/s", 1e6)
    with closing(run_shown(verify_shard, build_tasks(folder, listed), work, console, workers, address)) as verdicts:
        others = [*check_listings(folder, manifest, damage), *unlisted(present, manifest)]
        for problem in chain(others, check_shards(listed, verdicts)):
            if problem.what.startswith(MISSING) and problem.file in present:
                raise ValueError(f"a worker does not see {problem.file}; every machine must see {folder}")
            console.print(str(problem))
            found.append(problem)
    if found:
        count, stems = sum(problem.count for problem in found), {Path(problem.file).stem for problem in found}
        num_damaged = sum(Path(shard.tar).stem in stems for shard in manifest.shards)
        raise ValueError(
            f"{folder}: {count_text(count, 'problem')}, {num_damaged:,} of {count_text(num_shards, 'shard')} damaged; "
            f"delete the files named above and {AGAIN}: it writes these alone"
        )
    samples = count_text(manifest.num_samples, "sample")
    console.print(f"{samples} in {count_text(num_shards, 'shard')}, every byte as it was written")
    return manifest.model_dump(exclude_unset=True)


def check_listings(folder: Location, manifest: Manifest, damage: dict[str, str]) -> Iterator[Problem]:
    """Yields what is wrong with the files beside the shards; `damage` names those already known to be damaged."""
    yield from (Problem(name, what) for name, what in damage.items())
    if manifest.version == 1:
        yield Problem("manifest.json", OLD)
    for name, check in {"plan.json": check_plan, "rejects.jsonl": check_rejects}.items():
        try:
            with naming_damage(folder):
                data = read_whole(folder / name)
            check(data, manifest)
        except Damage as found:
            yield Problem(name, str(found))


def check_plan(data: bytes, manifest: Manifest) -> None:
    """Raises `Damage` where plan.json is not as it was written, or that of other shards."""
    if manifest.version > 1 and not listings.has_own_digest(data):
        raise Damage(DIFFERS_FROM_OWN)
    try:
        digest = listings.identity_digest(json.loads(data)["identity"])
    except (ValueError, LookupError, TypeError, RecursionError):
        digest = ""  # it does not say
    if manifest.identity_sha256 not in (None, digest):
        raise Damage("is not that of these shards")


def check_rejects(data: bytes, manifest: Manifest) -> None:
    """Raises `Damage` where rejects.jsonl is not as it was written, or the manifest counts other rows."""
    if listings.file_digest(data) != manifest.rejects:
        raise Damage(DIFFERS)
    if (num_rows := data.count(b"\n")) != manifest.num_rejected:
        raise Damage(f"holds {count_text(num_rows, 'row')}, manifest.json counts {manifest.num_rejected:,}")


def unlisted(present: Iterable[str], manifest: Manifest) -> Iterator[Problem]:
    """Yields the files that a reader could take for shards; what other tools keep here is theirs."""
    known = {name for shard in manifest.shards for name in (shard.tar, shard.sidecar)}
    for name in sorted(present):
        if name.endswith(".part"):
            yield Problem(name, "was left by a run that was stopped")
        elif name not in known and (name.endswith(".tar") or re.fullmatch(r"shard-\d+\.json", name)):
            yield Problem(name, "does not belong here, manifest.json does not list it")


def build_tasks(folder: Location, listed: Listings) -> Iterator[ReadTask]:
    """Yields the task of each shard; version 1 has the checksums of sidecars in index.json alone."""
    told = {shard.raw_data.basename: shard.raw_meta.hashes["sha256"] for shard in listed.index.shards}
    for shard in listed.manifest.shards:
        digest = shard.sidecar_sha256 or told.get(shard.tar)
        yield ReadTask(folder, shard.model_copy(update={"sidecar_sha256": digest}))


def check_shards(listed: Listings, verdicts: Iterable[Verdict]) -> Iterator[Problem]:
    """Yields what was found in shards, as they are read, and then what the listings say of them that is not so."""
    summaries = []
    for verdict in verdicts:
        yield from verdict.problems
        summaries += [verdict.summary] if verdict.summary else []
    if len(summaries) == len(listed.manifest.shards) and listed.manifest.version > 1:  # else a repair writes them anew
        yield from shorten([*compare(listed, sorted(summaries))])


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


if __name__ == "__main__":
    run(main)
