"""The sidecar of a shard, shard-000000.json beside shard-000000.tar: by it the tar is verified and samples are found.

Sample i is `keys[i]`, the bytes `[offsets[i], offsets[i] + sizes[i])` of the tar, with CRC-32 `checksums[i]`.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from common.console import count_text
from common.files import Location
from common.json_files import parse_json
from data_prep.listings import Damage, ShardEntry
from data_prep.records import Reject, json_bytes
from data_prep.tar_writer import END_OF_ARCHIVE

type Samples = list[tuple[str, int, int, int]]
"""Key, offset, size and CRC-32 of each sample."""


@dataclass(frozen=True)
class ReadTask:
    """One shard to read, and the numbers of those of its samples that a report shows."""

    folder: Location
    shard: ShardEntry
    chosen: tuple[int, ...] = ()

    def __str__(self) -> str:
        """What an error calls this task."""
        return self.shard.tar


class SampleSlot(NamedTuple):
    """What a sidecar says of a sample, but for its offset, which those before it give."""

    key: str
    num_bytes: int
    checksum: int
    num_images: int


class ShardSummary(NamedTuple):
    """What the driver keeps of a shard."""

    name: str
    num_samples: int
    num_images: int
    tar_bytes: int
    tar_sha256: str
    sidecar_bytes: int
    sidecar_sha256: str
    rejects: tuple[Reject, ...]
    is_new: bool
    formats: tuple[tuple[str, int], ...] = ()


def build_sidecar(tar: str, num_planned: int, samples: list[SampleSlot], sha256: str, rejects: list[dict]) -> bytes:
    """Returns the sidecar of a tar that holds these samples and has this hash."""
    *offsets, end = accumulate((sample.num_bytes for sample in samples), initial=0)
    fields = {
        "version": 1,
        "tar": tar,
        "bytes": end + len(END_OF_ARCHIVE),
        "sha256": sha256,
        "checksum": "crc32",
        "num_planned": num_planned,
        "num_samples": len(samples),
        "keys": [sample.key for sample in samples],
        "offsets": offsets,
        "sizes": [sample.num_bytes for sample in samples],
        "checksums": [sample.checksum for sample in samples],
        "num_images": [sample.num_images for sample in samples],
        "rejects": rejects,
    }
    return json_bytes(fields)


def read_summary(name: str, sidecar: bytes, is_new: bool) -> ShardSummary:
    """Returns the summary of a shard from its sidecar."""
    fields, sha256 = json.loads(sidecar), hashlib.sha256(sidecar).hexdigest()
    rejects = tuple(Reject(**reject) for reject in fields["rejects"])
    counts = (fields["num_samples"], sum(fields["num_images"]), fields["bytes"], fields["sha256"])
    return ShardSummary(name, *counts, len(sidecar), sha256, rejects, is_new)


def parse_sidecar(data: bytes, shard: ShardEntry) -> tuple[Samples, ShardSummary]:
    """Returns where the samples of a shard lie, and its summary, from its sidecar.

    Raises:
        Damage: It is not as it was written, or no sidecar of this shard.
    """
    if shard.sidecar_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise Damage("its bytes differ from the SHA-256 in manifest.json")
    try:
        fields = parse_json(data)
        columns = (fields[name] for name in ("keys", "offsets", "sizes", "checksums"))
        samples = list(zip(*columns, strict=True))
        summary = read_summary(Path(shard.tar).stem, data, is_new=False)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Damage("is not one that `make shards` writes") from None
    if len(samples) != shard.num_samples:
        raise Damage(f"lists {count_text(len(samples), 'sample')}, manifest.json {shard.num_samples:,}")
    return samples, summary
