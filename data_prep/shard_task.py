"""Writes one shard: a pure function of its task, so it may run anywhere, and twice.

Its sidecar is written after it: a later run accepts a tar whose bytes give exactly the sidecar that is there.
"""

import hashlib
import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from common.files import Location, open_file, read_whole, whole_file, write_whole
from data_prep.image_check import check_image, shrink_image
from data_prep.image_roots import ImageEntry, read_image
from data_prep.plan import Settings
from data_prep.records import Refused, build_record, refuse
from data_prep.sidecars import SampleSlot, ShardSummary, build_sidecar, read_summary
from data_prep.tar_writer import BLOCK_BYTES, END_OF_ARCHIVE, tar_sample

READS_AHEAD = 16  # images of a shard on their way from a store at a time
WRITEBACK_BYTES = 4 << 20


class PlannedRow(NamedTuple):
    """A row on its way into a shard: `text` is its JSON as the source spells it."""

    key: str
    index: int
    text: bytes
    images: tuple[ImageEntry, ...]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. With `recheck`, a shard that exists is written again and must come out the same."""

    name: str
    folder: Location
    rows: list[PlannedRow]
    settings: Settings
    recheck: bool = False

    def __str__(self) -> str:
        """The shard's name: what an error calls this task."""
        return self.name

    @property
    def tar(self) -> Location:
        """The shard."""
        return self.folder / f"{self.name}.tar"

    @property
    def sidecar(self) -> Location:
        """What tells where its samples lie."""
        return self.folder / f"{self.name}.json"


def write_shard(task: ShardTask) -> ShardSummary:
    """Returns the summary of a shard that is on the disk: verified if it was there, written otherwise.

    Raises:
        ValueError: An image is no longer what it was when the run, or the run that this one continues, began.
        OSError: A file cannot be read or written.
    """
    verified, formats = _verified_sidecar(task)
    if verified and not task.recheck:
        return _summary(task, verified, is_new=False, formats=formats)
    samples, rejects, sha256, num_waiting, formats = [], [], hashlib.sha256(), 0, Counter()
    with whole_file(task.tar) as file:
        for row, images in read_ahead(task.rows):
            value = json.loads(row.text)
            try:
                blocks = tar_sample(row.key, _members(value, row, images, task.settings))
            except Refused as problem:
                rejects.append(refuse(row.index, value, problem)._asdict())
                continue
            file.write(blocks)
            num_waiting += len(blocks)
            if num_waiting >= WRITEBACK_BYTES:
                _begin_writeback(file, num_waiting)
                num_waiting = 0
            sha256.update(blocks)
            samples.append(SampleSlot(row.key, len(blocks), zlib.crc32(blocks), len(row.images)))
            formats.update(_formats(blocks))
        file.write(END_OF_ARCHIVE)
        sha256.update(END_OF_ARCHIVE)
        sidecar = build_sidecar(task.tar.name, len(task.rows), samples, sha256.hexdigest(), rejects)
        if verified and verified != sidecar:
            raise ValueError(f"images behind {task.tar} are not what they were; use another --out or delete this one")
    write_whole(task.sidecar, sidecar)
    return _summary(task, sidecar, is_new=True, formats=formats)


def read_ahead(rows: list[PlannedRow]) -> Iterator[tuple[PlannedRow, Iterable[bytes]]]:
    """Yields each row with the bytes of its images, which are read as they are asked for.

    A store takes tens of milliseconds for an image, so there the images of the next rows are on their way already.
    """
    if not any("://" in entry.file for row in rows for entry in row.images):
        yield from ((row, map(read_image, row.images)) for row in rows)
        return
    with ThreadPoolExecutor(READS_AHEAD) as readers:
        on_the_way: deque[list[Future[bytes]]] = deque()
        try:
            for number, row in enumerate(rows):
                while number + len(on_the_way) < len(rows) and len(on_the_way) <= READS_AHEAD:
                    coming = rows[number + len(on_the_way)].images
                    on_the_way.append([readers.submit(read_image, entry) for entry in coming])
                yield row, (read.result() for read in on_the_way.popleft())
        finally:
            readers.shutdown(cancel_futures=True)


def _members(value: dict, row: PlannedRow, images: Iterable[bytes], settings: Settings) -> list[tuple[str, bytes]]:
    """Returns the record and its images; an image is named after the format its bytes tell, not after its file."""
    members, infos = [], []
    for number, (entry, data) in enumerate(zip(row.images, images, strict=True)):
        if settings.resize_longest:
            data, info, source = shrink_image(data, entry.path, settings.resize_longest)
        else:
            info = source = check_image(data, entry.path, decode=settings.check == "decode")
        member = info.extension if len(row.images) == 1 else f"{number}.{info.extension}"
        members.append((member, data))
        told = {"member": member, "path": entry.path, **info._asdict()}
        told |= {"found_as": entry.found_as} if entry.found_as else {}
        told |= {"source_width": source.width, "source_height": source.height} if info != source else {}
        infos.append(told)
    return [("json", build_record(value, row.index, infos)), *members]


def _begin_writeback(file: BinaryIO, num_bytes: int) -> None:
    """Lets the kernel write the last bytes of a file by and by, so that the sync at its end waits for little."""
    os.posix_fadvise(file.fileno(), file.tell() - num_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def _formats(blocks: bytes) -> list[str]:
    """Returns the format of each image of a sample, by its record, which comes first in its tar blocks."""
    num_bytes = int(blocks[124:135], 8)
    return [image["format"] for image in json.loads(blocks[BLOCK_BYTES : BLOCK_BYTES + num_bytes])["images"]]


def _verified_sidecar(task: ShardTask) -> tuple[bytes | None, Counter]:
    """Returns the sidecar of a shard and the formats of its images.

    None where the sidecar is not what one derives from the shard's rows and the tar on the disk.
    """
    samples, sha256, formats = [], hashlib.sha256(), Counter()
    try:
        sidecar = read_whole(task.sidecar)
        fields = json.loads(sidecar)
        refused = {reject["index"] for reject in fields["rejects"]}
        kept = [row for row in task.rows if row.index not in refused]
        with open_file(task.tar) as file:
            for row, size in zip(kept, fields["sizes"], strict=True):
                blocks = file.read(size)
                sha256.update(blocks)
                samples.append(SampleSlot(row.key, len(blocks), zlib.crc32(blocks), len(row.images)))
                formats.update(_formats(blocks))
            sha256.update(file.read())
        derived = build_sidecar(task.tar.name, len(task.rows), samples, sha256.hexdigest(), fields["rejects"])
        return sidecar if derived == sidecar else None, formats
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None, formats


def _summary(task: ShardTask, sidecar: bytes, is_new: bool, formats: Counter) -> ShardSummary:
    summary = read_summary(task.name, sidecar, is_new)._replace(formats=tuple(sorted(formats.items())))
    assert len(task.rows) == summary.num_samples + len(summary.rejects), f"{task.name} lost a row"
    return summary
