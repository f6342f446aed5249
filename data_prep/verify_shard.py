"""Re-reads one shard and names what is damaged in it: a pure function of its task.

Tar readers take a zeroed header, or a cut between two members, for the end of the archive and say nothing. So the tar
is not asked what it holds. Its sidecar is, and the sidecar is believed for its hash in index.json:

    sidecar   its SHA-256 is that in index.json
    samples   every byte is there, and the CRC-32 of each is that in the sidecar
    tar       two blocks of zeros and nothing behind them, and its SHA-256 is that in the sidecar
"""

import errno
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.files import Location, open_file, read_whole
from data_prep.records import Reject
from data_prep.shard_task import ShardSummary, build_sidecar, read_summary
from data_prep.tar_writer import BLOCK_BYTES, END_OF_ARCHIVE

MISSING = "is missing"
MAX_NAMED = 20  # problems of a shard that get a line each
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class VerifyTask:
    """One shard to read, and what the listings say of it; index.json has no hash where every row was refused."""

    folder: Location
    tar: str
    sidecar: str
    num_bytes: int
    tar_sha256: str
    sidecar_sha256: str | None
    num_rejected: int

    def __str__(self) -> str:
        """What an error calls this task."""
        return self.tar


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

    tar: str
    num_bytes: int
    problems: list[Problem]
    summary: ShardSummary | None


def verify_shard(task: VerifyTask) -> Verdict:
    """Returns what is wrong with a shard, after reading all of it, a sample at a time.

    Raises:
        OSError: A file is there but cannot be read, and not because the disk is damaged.
    """
    receipt, wrong = _read_sidecar(task)
    tar = task.folder / task.tar
    try:
        with open_buffered(tar) as file:
            found = check_samples(file, task.tar, json.loads(receipt)) if receipt else check_hash(file, task)
            problems = list(found)
    except OSError as error:
        problems = [Problem(task.tar, _told(error, tar))]
    if wrong:
        problems.insert(0, Problem(task.sidecar, wrong if problems else f"{wrong}; the tar is whole"))
    summary = read_summary(Path(task.tar).stem, receipt, is_new=False) if receipt else None
    return Verdict(task.tar, task.num_bytes, shorten(problems), summary)


def _read_sidecar(task: VerifyTask) -> tuple[bytes | None, str]:
    """Returns the sidecar if it is as it was written, else what is wrong with it."""
    sidecar = task.folder / task.sidecar
    try:
        receipt = read_whole(sidecar)
    except OSError as error:
        return None, _told(error, sidecar)
    if task.sidecar_sha256:
        whole = hashlib.sha256(receipt).hexdigest() == task.sidecar_sha256
        return (receipt, "") if whole else (None, "its bytes differ from the SHA-256 in index.json")
    try:
        rejects = [Reject(**reject)._asdict() for reject in json.loads(receipt)["rejects"]]
        empty_sha256 = hashlib.sha256(END_OF_ARCHIVE).hexdigest()
        whole = build_sidecar(task.tar, task.num_rejected, [], empty_sha256, rejects) == receipt
    except (ValueError, KeyError, TypeError):
        whole = False
    return (receipt, "") if whole else (None, f"it is not that of a shard with {task.num_rejected} refused rows alone")


def check_samples(file: BinaryIO, tar: str, sidecar: dict) -> Iterator[Problem]:
    """Yields what is wrong with a tar, by the sidecar that was written with it."""
    sha256, position, is_whole, missing = hashlib.sha256(), 0, True, []
    for key, size, checksum in zip(sidecar["keys"], sidecar["sizes"], sidecar["checksums"], strict=True):
        blocks = file.read(size)
        sha256.update(blocks)
        position += len(blocks)
        if not blocks:
            missing.append(key)
        elif len(blocks) < size or zlib.crc32(blocks) != checksum:
            is_whole = False
            cut = f"cut short: {len(blocks):,} of {size:,} bytes"
            what = cut if len(blocks) < size else "bytes differ from the checksum"
            yield Problem(tar, f"sample {key}{record_text(blocks)}: {what}")
    if missing:
        keys = missing[0] if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        ends = f"the tar ends at byte {position:,} of {sidecar['bytes']:,}"
        yield Problem(tar, f"sample{'s' * (len(missing) > 1)} {keys}: missing, {ends}", len(missing))
    elif position == sidecar["bytes"] - len(END_OF_ARCHIVE):
        for what in check_end(file, sha256):
            is_whole = False
            yield Problem(tar, f"{what}; no sample is touched")
        if is_whole and sha256.hexdigest() != sidecar["sha256"]:
            yield Problem(tar, "bytes differ from its SHA-256, though every sample has its CRC-32")


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


def check_hash(file: BinaryIO, task: VerifyTask) -> Iterator[Problem]:
    """Yields the problem of a tar that is not whole, where no sidecar can say which samples that touches."""
    if hashlib.file_digest(file, "sha256").hexdigest() != task.tar_sha256:  # type: ignore
        yield Problem(task.tar, "bytes differ from the SHA-256 in manifest.json; no sidecar says in which samples")


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


def _told(error: OSError, location: Location) -> str:
    """Returns what a failed read says about the file; any other error, which a second try may not meet, is raised."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(location, Path) and error.errno == errno.EIO:
        return "cannot be read: the disk reports an error"
    raise error
