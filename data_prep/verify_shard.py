"""Re-reads one shard and names what is damaged in it: a pure function of its task.

Tar readers take a zeroed header, or a cut between two members, for the end of the archive and say nothing. So the tar
is not asked what it holds. Its sidecar is, and the sidecar is believed for its hash in manifest.json:

    sidecar   its SHA-256 is that in manifest.json
    samples   every byte is there, and the CRC-32 of each is that in the sidecar
    tar       two blocks of zeros and nothing behind them, and its SHA-256 is that in manifest.json
"""

import errno
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.files import Location, open_file, read_whole
from data_prep.listings import Damage, ShardEntry
from data_prep.sidecars import ReadTask, Samples, ShardSummary, parse_sidecar
from data_prep.tar_writer import BLOCK_BYTES, END_OF_ARCHIVE

MISSING = "is missing"
MAX_NAMED = 20  # problems of a shard that get a line each
CHUNK_BYTES = 1 << 20


class Problem(NamedTuple):
    """What is wrong with a file, and the number of problems this stands for."""

    file: str
    what: str
    count: int = 1

    def __str__(self) -> str:
        """The line for the user."""
        return f"{self.file}: {self.what}"


class Verdict(NamedTuple):
    """What was found in a shard; `summary` is that of its sidecar, or None where that cannot be believed."""

    num_bytes: int
    problems: list[Problem]
    summary: ShardSummary | None


def verify_shard(task: ReadTask) -> Verdict:
    """Returns what is wrong with a shard, after reading all of it, a sample at a time.

    Raises:
        OSError: A file is there but cannot be read, and not because the disk is damaged.
    """
    shard, samples, summary, wrong = task.shard, None, None, ""
    try:
        with naming_damage(task.folder):
            data = read_whole(task.folder / shard.sidecar)
        samples, summary = parse_sidecar(data, shard)
    except Damage as damage:
        wrong = str(damage)
    try:
        with naming_damage(task.folder), open_file(task.folder / shard.tar) as file:
            problems = [Problem(shard.tar, *found) for found in check_tar(file, shard, samples)]
    except Damage as damage:
        problems = [Problem(shard.tar, str(damage))]
    if wrong:
        problems.insert(0, Problem(shard.sidecar, wrong if problems else f"{wrong}; the tar is whole"))
    return Verdict(shard.bytes, shorten(problems), summary)


def check_tar(file: BinaryIO, shard: ShardEntry, samples: Samples | None) -> list[tuple[str, int]]:
    """Returns what is wrong with a tar, and how often, by the samples in its sidecar or else by its hash alone."""
    sha256 = hashlib.sha256()

    def read(num_bytes: int) -> bytes:
        sha256.update(blocks := file.read(num_bytes))
        return blocks

    if samples is not None and (found := check_samples(read, shard, samples) or check_end(read)):
        return found
    while read(CHUNK_BYTES):
        pass
    if sha256.hexdigest() == shard.sha256:
        return []
    if samples is None:
        return [("bytes differ from the SHA-256 in manifest.json; no sidecar says in which samples", 1)]
    return [("bytes differ from its SHA-256, though every sample has its CRC-32", 1)]


def check_samples(read: Callable[[int], bytes], shard: ShardEntry, samples: Samples) -> list[tuple[str, int]]:
    """Returns what is wrong with the samples of a tar."""
    found, missing, num_read = [], [], 0
    for key, _, size, checksum in samples:
        blocks = read(size)
        num_read += len(blocks)
        if not blocks:
            missing.append(key)
        elif len(blocks) < size:
            found.append((f"sample {key}{record_text(blocks)}: cut short: {len(blocks):,} of {size:,} bytes", 1))
        elif zlib.crc32(blocks) != checksum:
            found.append((f"sample {key}{record_text(blocks)}: bytes differ from the checksum", 1))
    if missing:
        keys = f" {missing[0]}" if len(missing) == 1 else f"s {missing[0]} to {missing[-1]}"
        ends = f"the tar ends at byte {num_read:,} of {shard.bytes:,}"
        found.append((f"sample{keys}: missing, {ends}", len(missing)))
    return found


def check_end(read: Callable[[int], bytes]) -> list[tuple[str, int]]:
    """Returns what is wrong with a tar behind its last sample."""
    end, found = read(len(END_OF_ARCHIVE)), []
    if len(end) < len(END_OF_ARCHIVE):
        found.append(f"the end-of-archive blocks are cut short: {len(end):,} of {len(END_OF_ARCHIVE):,} bytes")
    elif end != END_OF_ARCHIVE:
        found.append("the end-of-archive blocks are not zero")
    if num_more := sum(map(len, iter(lambda: read(CHUNK_BYTES), b""))):
        found.append(f"{num_more:,} bytes follow the end of the archive")
    return [(f"{what}; no sample is touched", 1) for what in found]


def record_text(blocks: bytes) -> str:
    """Returns the words for a damaged sample's location in the source, or none where its record cannot be read."""
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
def naming_damage(folder: Location) -> Iterator[None]:
    """Raises `Damage` for a file that is not there or whose disk is bad; a second try may not meet any other error."""
    try:
        yield
    except FileNotFoundError:
        raise Damage(MISSING) from None
    except OSError as error:
        if isinstance(folder, Path) and error.errno == errno.EIO:
            raise Damage("cannot be read: the disk reports an error") from None
        raise
