"""Re-reads one shard and names what is damaged in it: a pure function of its task.

Tar readers take a zeroed header, or a cut between two members, for the end of the archive and say nothing. So the tar
is not asked what it holds. Its sidecar is, and the sidecar is believed for its hash in manifest.json:

    sidecar   its SHA-256 is that in manifest.json
    samples   every byte is there, and the CRC-32 of each is that in the sidecar
    tar       two blocks of zeros and nothing behind them, and its SHA-256 is that in manifest.json
"""

import errno
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.files import Location, open_file, read_whole
from common.json_files import parse_json
from data_prep.listings import ShardEntry
from data_prep.shard_task import ShardSummary, read_summary
from data_prep.tar_writer import BLOCK_BYTES, END_OF_ARCHIVE

MISSING = "is missing"
MAX_NAMED = 20  # problems of a shard that get a line each
CHUNK_BYTES = 1 << 20
SAME_CRC = "bytes differ from its SHA-256, though every sample has its CRC-32"


class VerifyTask(NamedTuple):
    """One shard to read, what manifest.json says of it, and the SHA-256 of its sidecar, None where nothing tells it."""

    folder: Location
    shard: ShardEntry
    sidecar_sha256: str | None

    def __str__(self) -> str:
        """What an error calls this task."""
        return self.shard.tar


class Problem(NamedTuple):
    """A line for the user: the file to blame, what is wrong with it, and the number of problems this stands for."""

    file: str
    what: str
    count: int = 1

    def __str__(self) -> str:
        """The line."""
        return f"{self.file}: {self.what}"


class Verdict(NamedTuple):
    """What was found in a shard; `summary` is that of its sidecar, or None where that cannot be believed."""

    num_bytes: int
    problems: list[Problem]
    summary: ShardSummary | None


def verify_shard(task: VerifyTask) -> Verdict:
    """Returns what is wrong with a shard, after reading all of it, a sample at a time.

    Raises:
        OSError: A file is there but cannot be read, and not because the disk is damaged.
    """
    shard = task.shard
    receipt, wrong = _read_sidecar(task)
    fields, summary = _understood(shard, receipt) if receipt else (None, None)
    if receipt and fields is None:
        wrong = "is not one that `make shards` writes"
    try:
        with open_buffered(task.folder / shard.tar) as file:
            problems = list(check_tar(file, shard, fields))
    except OSError as error:
        problems = [Problem(shard.tar, _told(error, task.folder))]
    if wrong:
        problems.insert(0, Problem(shard.sidecar, wrong if problems else f"{wrong}; the tar is whole"))
    return Verdict(shard.bytes, shorten(problems), summary)


def _understood(shard: ShardEntry, receipt: bytes) -> tuple[dict | None, ShardSummary | None]:
    """Returns what a sidecar says and its summary; None of both where it has the right digest but makes no sense."""
    try:
        return parse_json(receipt), read_summary(Path(shard.tar).stem, receipt, is_new=False)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, None


def _read_sidecar(task: VerifyTask) -> tuple[bytes | None, str]:
    """Returns the sidecar if it is as it was written, else what is wrong with it."""
    try:
        receipt = read_whole(task.folder / task.shard.sidecar)
    except OSError as error:
        return None, _told(error, task.folder)
    if hashlib.sha256(receipt).hexdigest() == task.sidecar_sha256:
        return receipt, ""
    return None, "its bytes differ from the SHA-256 in manifest.json" if task.sidecar_sha256 else ""


def check_tar(file: BinaryIO, shard: ShardEntry, sidecar: dict | None) -> Iterator[Problem]:
    """Yields what is wrong with a tar, by the sidecar that was written with it, or else by its hash alone."""
    sha256, num_read, num_bad, missing = hashlib.sha256(), 0, 0, []
    samples = zip(*(sidecar[name] for name in ("keys", "sizes", "checksums")), strict=True) if sidecar else ()
    for key, size, checksum in samples:
        blocks = file.read(size)
        sha256.update(blocks)
        num_read += len(blocks)
        if not blocks:
            missing.append(key)
        elif len(blocks) < size or zlib.crc32(blocks) != checksum:
            num_bad += 1
            cut = f"cut short: {len(blocks):,} of {size:,} bytes"
            what = cut if len(blocks) < size else "bytes differ from the checksum"
            yield Problem(shard.tar, f"sample {key}{record_text(blocks)}: {what}")
    if missing:
        keys = missing[0] if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        ends = f"the tar ends at byte {num_read:,} of {shard.bytes:,}"
        yield Problem(shard.tar, f"sample{'s' * (len(missing) > 1)} {keys}: missing, {ends}", len(missing))
    elif not sidecar or num_read == shard.bytes - len(END_OF_ARCHIVE):
        for what in check_end(file, sha256) if sidecar else ():
            num_bad += 1
            yield Problem(shard.tar, f"{what}; no sample is touched")
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
        if not num_bad and sha256.hexdigest() != shard.sha256:
            told = "in manifest.json; no sidecar says in which samples"
            yield Problem(shard.tar, f"bytes differ from the SHA-256 {told}" if not sidecar else SAME_CRC)


def check_end(file: BinaryIO, sha256: Any) -> Iterator[str]:
    """Yields what is wrong with the tar behind its last sample, and adds those bytes to the hash."""
    end = file.read(len(END_OF_ARCHIVE))
    sha256.update(end)
    if len(end) < len(END_OF_ARCHIVE):
        yield f"the end-of-archive blocks are cut short: {len(end):,} of {len(END_OF_ARCHIVE):,} bytes"
    elif end != END_OF_ARCHIVE:
        yield "the end-of-archive blocks are not zero"
    if num_more := sum(len(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")):
        yield f"{num_more:,} bytes follow the end of the archive"


def record_text(blocks: bytes) -> str:
    """Returns the words for a damaged sample's place in the source, or none where its record cannot be read."""
    try:
        record, _ = json.JSONDecoder().raw_decode(blocks[BLOCK_BYTES:].decode(errors="replace"))
        return f" (record {record['id']}, index {record['source_index']})"
    except (ValueError, KeyError, TypeError):
        return ""


def shorten(problems: list[Problem]) -> list[Problem]:
    """Returns the problems with those beyond MAX_NAMED in one line that names the last of them."""
    if len(problems) <= MAX_NAMED:
        return problems
    more, last = problems[MAX_NAMED - 1 :], problems[-1]
    count = sum(problem.count for problem in more)
    return [*problems[: MAX_NAMED - 1], Problem(last.file, f"and {count:,} more, the last: {last.what}", count)]


@contextmanager
def open_buffered(location: Location) -> Iterator[BinaryIO]:
    """Yields a file whose reads are short at its end alone; some web servers' are short where a packet ends."""
    with open_file(location) as file:
        raw: Any = file
        yield io.BufferedReader(raw)


def _told(error: OSError, folder: Location) -> str:
    """Returns what a failed read says about the file; any other error, which a second try may not meet, is raised."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(folder, Path) and error.errno == errno.EIO:
        return "cannot be read: the disk reports an error"
    raise error
