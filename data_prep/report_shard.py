"""Reads one shard for a report: statistics of all its records, and the pictures of the few samples to show.

A pure function of its task. Images are skipped, not read, but for those to show: a local tar is read by seeking from
record to record; one in a store through fsspec's buffer, in pieces of megabytes, and not by a request for each sample.
"""

import io
import tarfile
import zlib
from base64 import b64encode
from typing import IO, NamedTuple

from PIL import Image

from common.files import open_file, read_whole
from common.images import load_image
from common.json_files import parse_json
from data_prep.image_check import LOSSY
from data_prep.listings import AGAIN, Damage
from data_prep.report_stats import Stats, count, measure
from data_prep.sidecars import ReadTask, parse_sidecar
from data_prep.tar_writer import BLOCK_BYTES

THUMBNAIL_PIXELS = 256
MAX_THUMBNAILS = 4  # of a sample


class Card(NamedTuple):
    """A sample to show. A thumbnail is a data URI, or None where the image does not decode."""

    key: str
    num_bytes: int
    record: dict
    thumbnails: list[str | None]


class ShardReport(NamedTuple):
    """What a shard adds to a report."""

    num_samples: int
    stats: Stats
    cards: list[Card]


def read_shard(task: ReadTask) -> ShardReport:
    """Returns the statistics of a shard and its chosen samples.

    Raises:
        ValueError: The tar is not what its sidecar says.
        OSError: A file cannot be read.
    """
    tar, stats, cards = task.shard.tar, {}, []
    try:
        samples, _ = parse_sidecar(read_whole(task.folder / task.shard.sidecar), task.shard)
    except Damage as damage:
        raise ValueError(f"{task.shard.sidecar}: {damage}; delete it and {AGAIN}") from None
    with open_file(task.folder / tar) as file:
        for number, (key, offset, size, checksum) in enumerate(samples):
            file.seek(offset)
            record = read_record(file, key, tar)
            try:
                count(stats, measure(record, size))
            except (KeyError, TypeError, AttributeError, ArithmeticError):
                raise ValueError(f"{tar}: the record of sample {key} is damaged; delete it and {AGAIN}") from None
            if number in task.chosen:
                file.seek(offset)
                if zlib.crc32(blocks := file.read(size)) != checksum:
                    raise ValueError(f"{tar}: sample {key} is damaged (checksum); delete it and {AGAIN}")
                cards.append(Card(key, size, record, read_thumbnails(blocks, key, record["images"])))
    return ShardReport(len(samples), stats, cards)


def read_record(file: IO[bytes], key: str, tar: str) -> dict:
    """Returns the record of the sample at which a tar is open, leaving its images unread.

    Raises:
        ValueError: No record with this key begins here.
    """
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK_BYTES), "utf-8", "strict")
        if header.name != f"{key}.json":
            raise ValueError(f"found {header.name} in its place")
        return parse_json(file.read(header.size))
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{tar}: the record of sample {key} cannot be read ({error}); delete it and {AGAIN}") from None


def read_thumbnails(blocks: bytes, key: str, images: list[dict]) -> list[str | None]:
    """Returns the first few pictures of a sample, given its blocks of the tar."""
    with tarfile.open(fileobj=io.BytesIO(blocks)) as members:
        files = [members.extractfile(f"{key}.{image['member']}") for image in images[:MAX_THUMBNAILS]]
        return [thumbnail(file.read()) for file in files if file]


def thumbnail(data: bytes) -> str | None:
    """Returns an image at a size to look at, as a data URI, or None if it does not decode (it may be unchecked)."""
    stream = io.BytesIO()
    try:
        image = load_image(data)
        kind = "JPEG" if image.format in LOSSY else "PNG"  # what was drawn or written stays sharp
        small = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode.startswith("I"):  # 16 bits, which `convert` clips
            small = image.convert("I").point(lambda value: value / 257).convert("RGB")
    except ValueError:  # also where Pillow has no conversion
        return None
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    small.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{b64encode(stream.getvalue()).decode()}"
