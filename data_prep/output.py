"""What stands in a shard directory beside the shards and their sidecars.

plan.json       written first: what this directory is being made from; a continuation must agree with it
rejects.jsonl   every refused row
index.json      the shards as mosaicml-streaming lists them
manifest.json   written last: its presence says that everything else is there
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from common.files import Location, file_sizes, read_whole, remove, remove_parts, write_whole
from data_prep.listings import (
    DIFFERS_FROM_OWN,
    FORMAT,
    OWN_DIGEST,
    FileDigest,
    file_digest,
    fingerprint,
    has_own_digest,
    identity_digest,
    read_listings,
    read_manifest,
    with_own_digest,
)
from data_prep.plan import Scan, differences
from data_prep.records import Reject, json_bytes
from data_prep.sidecars import ShardSummary

STATUS_FILES = ("plan.json", "rejects.jsonl", "index.json", "manifest.json", ".lock")


def prepare(folder: Location, plan: dict) -> bool:
    """Returns whether shards that are already in the folder must be written again to be trusted.

    That is so when image files have a new date but their old sizes. Enters the plan, and takes down the files that say
    the folder is complete.

    Args:
        folder: The shard directory.
        plan: What it is made from: an `identity`, and `modified_sha256`, which vouches for images of unchanged size.

    Raises:
        ValueError: The folder belongs to other input or settings, or holds something else.
    """
    before, present = _read_plan(folder, plan), file_sizes(folder)
    if before is None and (others := sorted(present.keys() - {*STATUS_FILES})):
        raise ValueError(f"{folder} is not empty (it holds {others[0]}) and has no plan.json; use another --out")
    begun = any(name.endswith(".tar") for name in present) and before
    if begun and (changes := differences(begun["identity"], plan["identity"])):
        raise ValueError(f"{folder} holds other shards: {'; '.join(changes)}; use another --out or delete this one")
    recheck = bool(begun) and begun["modified_sha256"] != plan["modified_sha256"]
    if not recheck:  # a recheck changes nothing, or refuses and leaves what was there
        write_plan(folder, plan)
        for name in ("manifest.json", "index.json"):
            remove(folder / name)
    remove_parts(folder)
    return recheck


def _read_plan(folder: Location, plan: dict) -> dict | None:
    """Returns the plan in a folder, None where there is none.

    One that is lost or damaged is `plan` itself if the manifest says that these shards were made from the same; the
    dates of their images are then taken to be the same too, for nothing else tells them.
    """
    data = _bytes_of(folder / "plan.json")
    try:
        if data:
            return _parse_plan(data)
    except (ValueError, KeyError, TypeError) as error:
        if not _was_finished(folder, plan):
            wrong = f"{folder / 'plan.json'} is damaged ({error}); use another --out or delete this one"
            raise ValueError(wrong) from None
    return plan if _was_finished(folder, plan) else None


def _parse_plan(data: bytes) -> dict:
    """Returns what a plan.json holds; that of version 1 has no digest of its own."""
    plan = json.loads(data)
    if (OWN_DIGEST in plan or "identity" not in plan) and not has_own_digest(data):
        raise ValueError(DIFFERS_FROM_OWN)
    return {"identity": {**plan["identity"]}, "modified_sha256": plan["modified_sha256"]}


def _was_finished(folder: Location, plan: dict) -> bool:
    try:
        return read_manifest(folder).identity_sha256 == identity_digest(plan["identity"])
    except ValueError:
        return False


def _bytes_of(file: Location) -> bytes | None:
    try:
        return read_whole(file)
    except FileNotFoundError:
        return None


def write_plan(folder: Location, plan: dict) -> None:
    """Enters what the folder is made from, unless it is there."""
    if _bytes_of(folder / "plan.json") != with_own_digest(plan):
        write_whole(folder / "plan.json", with_own_digest(plan))


def finished(folder: Location, plan: dict) -> dict[str, Any] | None:
    """Returns the manifest of a folder that is complete and was made from the same, None where work remains.

    Work remains too where a listing is damaged, or of a version that has no checksums of listings.
    """
    if _bytes_of(folder / "plan.json") != with_own_digest(plan):
        return None
    try:
        manifest, index = read_listings(folder)
    except ValueError:
        return None
    present = file_sizes(folder)
    files = [file for shard in index.shards for file in (shard.raw_data, shard.raw_meta)]
    whole = all(present.get(file.basename) == file.bytes for file in files)
    others = {name for shard in manifest.shards for name in (shard.tar, shard.sidecar)}  # index.json lacks some
    whole = whole and present.keys() >= others and present.get("rejects.jsonl") == manifest.rejects.bytes
    whole = whole and manifest.identity_sha256 == identity_digest(plan["identity"])
    return manifest.model_dump(exclude_unset=True) if whole else None


def finalize(folder: Location, plan: dict, summaries: Sequence[ShardSummary], scan: Scan, origin: dict) -> dict:
    """Writes rejects, index and manifest, in this order; returns the manifest.

    Args:
        folder: The shard directory, which holds the plan and all shards.
        plan: What stands in plan.json.
        summaries: Of all shards.
        scan: What the shards were made from.
        origin: What else the manifest tells: `settings`, `sources`, and the `code` that wrote the shards.
    """
    summaries = sorted(summaries)
    rejects = sorted([*scan.rejects, *(reject for summary in summaries for reject in summary.rejects)])
    index = json_bytes(build_index(summaries, origin["settings"]["shard_bytes"]))
    remove_parts(folder)
    manifest = build_manifest(summaries, scan.num_rows, len(rejects)) | {
        "rejects": write_rejects(folder, rejects, origin["sources"]["data"]["name"]).model_dump(),
        "identity_sha256": identity_digest(plan["identity"]),
        "index": file_digest(index).model_dump(),
        "num_other_extensions": scan.num_other_extensions,
        **origin,
    }
    write_whole(folder / "index.json", index)
    write_whole(folder / "manifest.json", data := with_own_digest(manifest))
    return json.loads(data)


def build_manifest(summaries: Sequence[ShardSummary], num_rows: int, num_rejected: int) -> dict:
    """Returns the counts and hashes of a complete set of shards; the fingerprint depends on the shards' bytes alone."""
    num_samples = sum(summary.num_samples for summary in summaries)
    assert num_rows == num_samples + num_rejected, f"{num_rows} became {num_samples} + {num_rejected}"
    return {
        "version": 2,
        "fingerprint": fingerprint(summary.tar_sha256 for summary in summaries),
        "num_rows": num_rows,
        "num_samples": num_samples,
        "num_rejected": num_rejected,
        "num_images": sum(summary.num_images for summary in summaries),
        "num_shards": len(summaries),
        "num_bytes": sum(summary.tar_bytes for summary in summaries),
        "shards": [
            {
                "tar": f"{summary.name}.tar",
                "sidecar": f"{summary.name}.json",
                "sha256": summary.tar_sha256,
                "bytes": summary.tar_bytes,
                "sidecar_sha256": summary.sidecar_sha256,
                "num_samples": summary.num_samples,
                "num_images": summary.num_images,
                "num_rejected": len(summary.rejects),
            }
            for summary in summaries
        ],
    }


def build_index(summaries: Iterable[ShardSummary], shard_bytes: int) -> dict:
    """Returns index.json as mosaicml-streaming reads it.

    The fields of a shard are those of `streaming.base.format.base.reader.SplitReader`: the tar is its data file and the
    sidecar its meta file. Shards of which every row was refused are left out, because streaming does not expect them.
    """
    return {
        "version": 2,
        "shards": [
            {
                "version": 2,
                "format": FORMAT,
                "compression": None,
                "hashes": ["sha256"],
                "samples": shard.num_samples,
                "size_limit": shard_bytes,
                "raw_data": _file_info(f"{shard.name}.tar", shard.tar_bytes, shard.tar_sha256),
                "raw_meta": _file_info(f"{shard.name}.json", shard.sidecar_bytes, shard.sidecar_sha256),
                "zip_data": None,
                "zip_meta": None,
            }
            for shard in summaries
            if shard.num_samples
        ],
    }


def _file_info(basename: str, num_bytes: int, sha256: str) -> dict:
    return {"basename": basename, "bytes": num_bytes, "hashes": {"sha256": sha256}}


def write_rejects(folder: Location, rejects: Iterable[Reject], source: str) -> FileDigest:
    """Writes rejects.jsonl, in the order of the source; returns its size and SHA-256, for the manifest."""
    lines = b"".join(reject_line(reject, source) for reject in sorted(rejects))
    write_whole(folder / "rejects.jsonl", lines)
    return file_digest(lines)


def reject_line(reject: Reject, source: str) -> bytes:
    """Returns the line of a refused row."""
    return json_bytes({"source": source, **reject._asdict()}) + b"\n"
