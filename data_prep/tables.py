"""Rows of Parquet files and of Hugging Face datasets folders, with their images inside, a row group at a time.

    DATA=train.parquet              columns such as `conversations` or `messages`, and `image` or `images`
    DATA=folder, s3://bucket/x      all its .parquet or .arrow files (as of `Dataset.save_to_disk`), sorted by name

An image is `{bytes, path}`, plain bytes, or a list of these; where there are only paths, they are looked for under
--images. A cell that is null is a key that the row does not have.

Shards take rows from everywhere, and a row group is read as a whole or not at all. So the rows are read once, in order,
and laid down as JSON lines and a file of images (`Spool`), in the temporary folder, from where workers read what they
need: memory holds a row group, the disk all of the images.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from common.files import Location, file_sizes, named_errors
from common.json_files import TOO_DEEP, is_too_deep
from common.paths import check_regular
from data_prep.image_roots import ImageEntry
from data_prep.json_rows import Row

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_A_TIME = 64  # of a row group are made into Python objects
IMAGE_COLUMNS = ("image", "images")
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.\w+")


class Table(NamedTuple):
    """A file of rows: what the manifest tells of it, and where its rows begin among all."""

    name: str
    bytes: int
    sha256: str
    first_row: int


def find_tables(location: Location) -> list[Location]:
    """Returns the files of rows at a location: itself, those in it, or none where it is something else (JSON).

    Raises:
        ValueError: It is a folder without such files, or of several splits.
    """
    check_regular(location)
    if location.suffix in SUFFIXES and not (isinstance(location, Path) and location.is_dir()):
        return [location]
    if location.suffix in (".json", ".jsonl", ".ndjson") or location.is_file():
        return []
    present = file_sizes(location)
    names = sorted(name for name in present if name.endswith(SUFFIXES))
    if "dataset_dict.json" in present:
        raise ValueError(f"{location} holds the splits of a data set; name the folder of one, such as {location}/train")
    if len(splits := {found[1] for found in map(SPLIT.fullmatch, names) if found}) > 1:
        raise ValueError(
            f"{location} holds several splits ({', '.join(sorted(splits))}); give each a folder of its own"
        )
    if not names and isinstance(location, Path) and location.is_dir():
        raise ValueError(f"{location} is a folder without .parquet or .arrow files; name a file of rows, or theirs")
    return [location / name for name in names]


def read_table(path: Path, name: object) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet or Arrow file, reading a row group (or record batch) when the one before is used up.

    Raises:
        ValueError: The file is damaged, or a column holds what JSON cannot hold.
    """
    try:
        for batch in _batches(path):
            check_schema(batch.schema)
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                yield from batch.slice(start, ROWS_AT_A_TIME).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name} cannot be read as a table of rows: {told}; fetch or write it again") from None


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(batch_size=ROWS_AT_A_TIME, row_groups=[group])
        return
    with pa.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:  # what `save_to_disk` writes
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def check_schema(schema: pa.Schema) -> None:
    """Makes sure that columns have different names, and that none but those of images holds bytes.

    Raises:
        ValueError: They have not, or one does.
    """
    if len(twice := schema.names) != len(set(twice)):
        name = next(name for name in twice if twice.count(name) > 1)
        raise ValueError(f"column {name!r} is there {twice.count(name)} times, and only one can be meant; rename it")
    for column in schema:
        if column.name not in IMAGE_COLUMNS and "binary" in str(column.type):
            raise ValueError(f"column {column.name!r} holds bytes, and only {' and '.join(IMAGE_COLUMNS)} may")


def take_images(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns a row with paths in the place of its images, and those images by path; nulls are left out.

    An image keeps the path it came with if that is a relative one; else it is called by the hash of its bytes.
    """
    images: dict[str, bytes] = {}
    row = {key: value for key, value in row.items() if value is not None}
    for column in IMAGE_COLUMNS:
        cell = row.get(column)
        if isinstance(cell, list):
            row[column] = [_take(item, images) for item in cell]
        elif column in row:
            row[column] = _take(cell, images)
    return row, images


def _take(item: Any, images: dict[str, bytes]) -> Any:
    data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, None)
    if not isinstance(data, bytes):
        return path if data is None and isinstance(item, dict) else item
    if not (isinstance(path, str) and _is_relative(path) and images.get(path, data) == data):
        path = hashlib.sha256(data).hexdigest()[:32]
    images[path] = data
    return path


def _is_relative(path: str) -> bool:
    return bool(path) and path[0] != "/" and ".." not in path.split("/") and not {"\\", "\0", ":"} & set(path)


class Spool:
    """Rows as JSON lines and their images in one file, to be read in any order; 8 bytes of memory a row."""

    def __init__(self, folder: Path, keep_images: bool = True) -> None:
        """Opens files in an empty folder; without `keep_images` no image is written, only found."""
        self.rows, self.images, self.keep_images = folder / "rows.jsonl", folder / "images", keep_images
        self._files = [(folder / name).open("w+b") for name in ("rows.jsonl", "images", "slots.jsonl")]
        self._starts, self._num_image_bytes = array("q"), 0
        self._held = (-1, {})  # where the images lie of the row that was added or asked for last

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, row: dict[str, Any]) -> Row:
        """Returns a row as it lies here now."""
        rows, images, slots = self._files
        value, data_of = take_images(row)
        text, found = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace"), {}
        index, start = len(self._starts), rows.tell()
        with named_errors(self.images):
            for path, data in data_of.items():
                found[path] = (self._num_image_bytes, len(data))
                self._num_image_bytes += len(data)
                if self.keep_images:
                    images.write(data)
            rows.write(text + b"\n")
            self._starts.append(slots.tell())
            slots.write(json.dumps(found).encode() + b"\n")
        self._held = (index, found)
        value = json.loads(text)
        is_deep = is_too_deep(value)
        return Row(index, start, len(text), None if is_deep else value, TOO_DEEP if is_deep else None)

    def flush(self) -> None:
        """Lets all that was added be read by others."""
        with named_errors(self.images):
            for file in self._files:
                file.flush()

    def find(self, index: int, path: str) -> ImageEntry | None:
        """Returns where the image is that a row brought along under a path, None if it brought no such image."""
        if self._held[0] != index:
            with named_errors(self.images):
                self._files[2].seek(self._starts[index])
                self._held = (index, json.loads(self._files[2].readline()))
        slot = self._held[1].get(path)
        return slot and ImageEntry(path, str(self.images), slot[1], 0, offset=slot[0])

    def close(self) -> None:
        """Closes the files, which writes what they still hold."""
        with named_errors(self.images), ExitStack() as closed:
            for file in self._files:
                closed.callback(file.close)
