"""The shard plan: which row goes into which shard under which key, before a single image is read.

Everything here is a pure function of the rows, of what was found at their image paths, and of three settings, so that
any number of workers, finishing in any order, write the same bytes. A plan costs about 150 bytes of memory per row.

    rows 0..n-1  --scan-->  fit rows and rejects  --order-->  shuffled  --cut-->  [0, 4810), [4810, 9655), ...
"""

import hashlib
import posixpath
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from unicodedata import normalize

import numpy as np

from common.console import UsageError
from data_prep.image_roots import ImageEntry
from data_prep.json_rows import Row
from data_prep.records import DUPLICATE, CheckedRow, Refused, Reject, check_row, content_digest, refuse, row_id
from data_prep.tar_writer import member_bytes

OTHER_EXTENSION = "image found under another extension than the row says"
OTHER_FORM = "image found under the other Unicode form (NFC, NFD) of its path"
OTHER_SHAPE = "row in another shape than LLaVA's"
LAYOUT = 2
"""Raised when the same input and settings would give other bytes than before."""


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of the shards, beside the input itself."""

    shard_bytes: int = 256_000_000
    seed: int = 0
    shuffle: bool = True
    check: str = "decode"
    resize_longest: int | None = None
    deduplicate: bool = False
    layout: int = LAYOUT

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        if self.check not in ("decode", "header"):
            raise UsageError(f"--check {self.check} is unknown; use decode or header")
        if self.resize_longest is not None and self.resize_longest < 1:
            raise UsageError(f"--resize-longest {self.resize_longest} must be at least 1 pixel")
        if self.resize_longest and self.check != "decode":
            raise UsageError("--resize-longest decodes every image; leave --check at decode")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} must not be negative")


@dataclass
class Scan:
    """The fit rows of a source in its order (parallel arrays), and the others as rejects.

    `notes` tells what is worth knowing of fit rows: how often each was met, and the first.
    """

    num_rows: int = 0
    indices: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))
    row_bytes: array = field(default_factory=lambda: array("q"))
    sample_bytes: array = field(default_factory=lambda: array("q"))
    rejects: list[Reject] = field(default_factory=list)
    num_other_extensions: int = 0
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    images_sha256: str = ""
    modified_sha256: str = ""


def scan_rows(
    rows: Iterable[Row],
    find: Callable[[str], ImageEntry | None],
    deduplicate: bool = False,
    special_tokens: Sequence[str] = (),
) -> Scan:
    """Returns the plan's raw material: every row checked, every image found and weighed.

    Args:
        rows: The rows of the source, in order.
        find: Returns the entry of an image path, or None where there is no such image.
        deduplicate: Refuse a row that says the same about the same image paths as an earlier one.
        special_tokens: Of a tokenizer; rows that spell one are noted.
    """
    scan, images, modified = Scan(), hashlib.sha256(), hashlib.sha256()
    seen: dict[bytes, int] = {}
    for row in rows:
        scan.num_rows += 1
        try:
            if row.problem:
                raise Refused("nested", f"the row is {row.problem}")
            checked = check_row(row.value)
            paths = checked.paths
            entries = [find(path) for path in paths]
            for path, entry in zip(paths, entries, strict=True):
                images.update(
                    f"{path}\0{(entry.num_bytes, entry.slot and entry.slot.crc) if entry else None}\n".encode()
                )
                modified.update(f"{entry.version if entry else None}\n".encode())
            for path, entry in zip(paths, entries, strict=True):
                if entry is None:
                    raise Refused("image_missing", "no such image under --images", path)
            if deduplicate and (first := seen.setdefault(content_digest(checked), row.index)) != row.index:
                raise Refused(DUPLICATE, f"the same images and conversations as the row at index {first}")
        except Refused as problem:
            scan.rejects.append(refuse(row.index, row.value, problem))
            continue
        scan.indices.append(row.index)
        scan.offsets.append(row.offset)
        scan.row_bytes.append(row.num_bytes)
        for note, example in _notes(checked, [entry for entry in entries if entry], special_tokens):
            count, first = scan.notes.get(note, (0, f"{example} (record {row_id(row.value, row.index)})"))
            scan.notes[note] = count + 1, first
        scan.num_other_extensions = scan.notes.get(OTHER_EXTENSION, (0, ""))[0]
        scan.sample_bytes.append(_estimate_bytes(checked.row, [entry.num_bytes for entry in entries if entry]))
    scan.images_sha256, scan.modified_sha256 = images.hexdigest(), modified.hexdigest()
    return scan


def _notes(checked: CheckedRow, entries: list[ImageEntry], special_tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields what is worth knowing of a fit row, and the example that it is."""
    for entry in entries:
        if entry.found_as is not None:
            same = normalize("NFC", entry.found_as) == normalize("NFC", posixpath.normpath(entry.path))
            yield (OTHER_FORM if same else OTHER_EXTENSION), f"{entry.path!a} as {entry.found_as!a}"
    if checked.source_shape:
        yield OTHER_SHAPE, " ".join(f"{ours}={theirs}" for ours, theirs in checked.source_shape.items())
    for token in special_tokens:
        for number, turn in enumerate(checked.row["conversations"]):
            if token in turn["value"]:
                yield f"row with the special token {token} in its text", f"turn {number}"
                break


def _estimate_bytes(row: dict, image_bytes: list[int]) -> int:
    """Returns about the bytes a sample will take in its tar.

    The record is estimated from its texts, not from its spelling in the source, so that a JSON array and the same rows
    as JSONL are cut alike.
    """
    text_bytes = 300 + sum(40 + len(turn["value"]) for turn in row["conversations"])
    return member_bytes(text_bytes) + sum(member_bytes(size) for size in image_bytes)


@dataclass(frozen=True)
class Plan:
    """The order of the fit rows of a scan, and the positions of that order which each shard takes."""

    order: np.ndarray
    shards: list[range]


def build_plan(scan: Scan, settings: Settings) -> Plan:
    """Returns the plan of a scan: every fit row at exactly one position, every position in exactly one shard."""
    order = order_rows(len(scan.indices), settings)
    return Plan(order, list(cut_shards((scan.sample_bytes[row] for row in order), settings.shard_bytes)))


def order_rows(num_rows: int, settings: Settings) -> np.ndarray:
    """Returns int64[num_rows], the row at each position of the plan: a permutation that depends on the seed alone.

    Places are dealt by sorting the raw 64-bit stream of PCG64, which numpy keeps stable across versions (its
    `permutation` may change).
    """
    if not settings.shuffle:
        return np.arange(num_rows)
    return np.argsort(np.random.PCG64(settings.seed).random_raw(num_rows), kind="stable")


def cut_shards(sample_bytes: Iterable[int], shard_bytes: int) -> Iterator[range]:
    """Yields the positions of each shard in turn: as many samples as fit in `shard_bytes`, at least one."""
    start, total, position = 0, 0, -1
    for position, size in enumerate(sample_bytes):
        if position > start and total + size > shard_bytes:
            yield range(start, position)
            start, total = position, 0
        total += size
    if position >= start:
        yield range(start, position + 1)


def sample_key(position: int) -> str:
    """Returns the key of the sample at a position of the plan: of fixed width and without dots, which end a key."""
    return f"{position:09d}"


def shard_name(number: int) -> str:
    """Returns the name of a shard, without extension."""
    return f"shard-{number:06d}"


def identity(scan: Scan, settings: Settings, data_sha256: str) -> dict:
    """Returns what must not change between a run and its continuation, by the names a user knows it under."""
    inputs = {"data (sha256)": data_sha256, "images (sha256 of paths and sizes)": scan.images_sha256}
    return inputs | {name.replace("_", "-"): value for name, value in asdict(settings).items()}


def differences(before: dict, now: dict) -> list[str]:
    """Returns one phrase for each entry of two identities that differs."""
    changed = [(name, before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)]
    return [
        f"other {name.partition(' (')[0]}" if "(sha256" in name else f"{name} was {was}, is {is_now}"
        for name, was, is_now in changed
    ]
