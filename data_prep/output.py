"""What stands in a shard directory beside the shards and their sidecars.

plan.json       written first: what this directory is being made from; a continuation must agree with it
rejects.jsonl   every refused row
index.json      the shards as mosaicml-streaming lists them
manifest.json   written last: its presence says that everything else is there
"""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import PIL

from common.files import Location, file_sizes, read_whole, remove, remove_parts, write_whole
from data_prep.plan import Scan, Settings, differences
from data_prep.records import Reject, json_bytes
from data_prep.shard_task import ShardSummary

FORMAT = "saisa-tar"
STATUS_FILES = ("plan.json", "rejects.jsonl", "index.json", "manifest.json", ".lock")


def prepare(folder: Location, identity: dict, modified_sha256: str) -> bool:
    """Returns whether shards that are already in the folder must be written again to be trusted.

    That is so when image files have a new date but their old sizes. Enters the plan, and takes down the files that say
    the folder is complete.

    Raises:
        ValueError: The folder belongs to other input or settings, or holds something else.
    """
    before, present = _read_plan(folder), file_sizes(folder)
    if before is None and (others := sorted(present.keys() - {*STATUS_FILES})):
        raise ValueError(f"{folder} is not empty (it holds {others[0]}) and has no plan.json; use another --out")
    begun = any(name.endswith(".tar") for name in present) and before
    if begun and (changes := differences(begun["identity"], identity)):
        raise ValueError(f"{folder} holds other shards: {'; '.join(changes)}; use another --out or delete this one")
    recheck = bool(begun) and begun["modified_sha256"] != modified_sha256
    if not recheck:  # a recheck changes nothing, or refuses and leaves what was there
        for name in ("manifest.json", "index.json"):
            remove(folder / name)
    remove_parts(folder)
    if not begun:
        write_plan(folder, identity, modified_sha256)
    return recheck


def _read_plan(folder: Location) -> dict | None:
    try:
        return json.loads(read_whole(folder / "plan.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / 'plan.json'} is damaged ({error}); use another --out or delete this one") from None


def write_plan(folder: Location, identity: dict, modified_sha256: str) -> None:
    """Enters what the folder is made from; `modified_sha256` vouches for images of unchanged size."""
    write_whole(folder / "plan.json", _pretty({"identity": identity, "modified_sha256": modified_sha256}))


def finished(folder: Location, identity: dict, modified_sha256: str) -> dict | None:
    """Returns the manifest of a folder that is complete and was made from the same, None where work remains."""
    try:
        plan, index, manifest = (
            json.loads(read_whole(folder / f"{name}.json")) for name in ("plan", "index", "manifest")
        )
        shards = [shard[part] for shard in index["shards"] for part in ("raw_data", "raw_meta")]
        present = file_sizes(folder)
        whole = all(present.get(shard["basename"]) == shard["bytes"] for shard in shards)
        others = {shard[part] for shard in manifest["shards"] for part in ("tar", "sidecar")}  # index.json lacks some
        whole = whole and present.keys() >= others and present.get("rejects.jsonl") == manifest["rejects"]["bytes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    same = plan == {"identity": identity, "modified_sha256": modified_sha256}
    return manifest if same and whole else None


def finalize(
    folder: Location, summaries: Sequence[ShardSummary], scan: Scan, settings: Settings, sources: dict
) -> dict:
    """Writes rejects, index and manifest, in this order; returns the manifest."""
    summaries = sorted(summaries)
    rejects = sorted([*scan.rejects, *(reject for summary in summaries for reject in summary.rejects)])
    manifest = build_manifest(summaries, scan.num_rows, len(rejects))
    remove_parts(folder)
    manifest |= {
        "rejects": write_rejects(folder, rejects, sources["data"]["name"]),
        "num_other_extensions": scan.num_other_extensions,
        "settings": asdict(settings),
        "sources": sources,
        "code": code_version(),
    }
    write_whole(folder / "index.json", json_bytes(build_index(summaries, settings)))
    write_whole(folder / "manifest.json", _pretty(manifest))
    return manifest


def build_manifest(summaries: Sequence[ShardSummary], num_rows: int, num_rejected: int) -> dict:
    """Returns the counts and hashes of a complete set of shards; the fingerprint depends on the shards' bytes alone."""
    num_samples = sum(summary.num_samples for summary in summaries)
    assert num_rows == num_samples + num_rejected, f"{num_rows} rows became {num_samples} + {num_rejected}"
    return {
        "version": 1,
        "fingerprint": hashlib.sha256("\n".join(summary.tar_sha256 for summary in summaries).encode()).hexdigest(),
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
                "num_samples": summary.num_samples,
                "num_images": summary.num_images,
                "num_rejected": len(summary.rejects),
            }
            for summary in summaries
        ],
    }


def build_index(summaries: Iterable[ShardSummary], settings: Settings) -> dict:
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
                "size_limit": settings.shard_bytes,
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


def write_rejects(folder: Location, rejects: Iterable[Reject], source: str) -> dict:
    """Writes rejects.jsonl, in the order of the source; returns its bytes and SHA-256, for the manifest."""
    lines = b"".join(reject_line(reject, source) for reject in sorted(rejects))
    write_whole(folder / "rejects.jsonl", lines)
    return {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()}


def reject_line(reject: Reject, source: str) -> bytes:
    """Returns the line of a refused row."""
    return json_bytes({"source": source, **reject._asdict()}) + b"\n"


def code_version() -> dict:
    """Returns what wrote the shards: this project's version and Pillow's, which decides what decodes."""
    here = Path(__file__).resolve().parent
    described = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    try:
        version = described.stdout.strip() or metadata.version("saisa")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {"saisa": version, "pillow": PIL.__version__}


def _pretty(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
