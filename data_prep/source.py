"""The input of a sharding run: its rows, read once and checked, and its images, found but not read."""

import hashlib
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.console import count_text
from common.files import Location, local_copy, open_location
from data_prep.image_roots import ImageEntry, ImageRoots, open_images
from data_prep.json_rows import Row, read_rows
from data_prep.plan import Scan, Settings, scan_rows
from data_prep.reporting import build_task_progress
from data_prep.tables import Spool, Table, find_tables, read_table


@dataclass(frozen=True)
class Source:
    """Scanned input: the rows, here as a local file whatever `name` they have, and the images they mean.

    `find` returns the image of a row, by the row's index and the path in it; `tables` are the files that rows with
    images inside came from.
    """

    name: str
    rows: Path
    find: Callable[[int, str], ImageEntry | None]
    scan: Scan
    description: dict
    tables: tuple[Table, ...] = ()

    def place(self, index: int) -> str:
        """Returns the words for where a row stands."""
        if len(self.tables) < 2:
            return f"index {index}"
        table = self.tables[bisect_right([table.first_row for table in self.tables], index) - 1]
        return f"index {index}, row {index - table.first_row} of {table.name}"


@contextmanager
def open_source(
    data: str | Path,
    images: str | Path | Sequence[str | Path],
    settings: Settings,
    console: Console,
    keep_images: bool = True,
    special_tokens: Sequence[str] = (),
) -> Iterator[Source]:
    """Yields the input with every row checked and every image found.

    Without `keep_images`, images inside the rows are found and weighed, but cannot be read afterwards.

    Raises:
        ValueError: The rows are no list of rows or come out of a pipe, or a root of the images is not there.
    """
    locations = [str(location) for location in ([images] if isinstance(images, str | Path) else images)]
    location = open_location(data)
    with ExitStack() as held:
        if tables := find_tables(location):
            roots = open_images(locations) if locations else ImageRoots([])
            spool = Spool(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="saisa-"))), keep_images)
            held.enter_context(closing(spool))
            yield scan_tables(tables, location, spool, roots, settings, console, locations, special_tokens)
            return
        roots = open_images(locations)
        rows = held.enter_context(local_copy(location))
        scan = scan_source(rows, location, roots, settings, console, special_tokens)
        told = {"name": _named(location.name), "bytes": rows.stat().st_size, "sha256": _sha256(rows)}
        yield Source(
            _named(location.name), rows, lambda _, path: roots.find(path), scan, describe(told, locations, scan)
        )


@contextmanager
def open_rows(
    data: str | Path, keep_images: bool = True
) -> Iterator[tuple[Iterator[Row], Callable[[int, str], ImageEntry | None]]]:
    """Yields the rows of a file or folder that `make shards` takes, unchecked, and what finds images that came inside.

    That takes a row's index and a path in the row, when the row has been read; without `keep_images` it only tells
    whether there is one.

    Raises:
        ValueError: These are no rows.
    """
    location = open_location(data)
    with ExitStack() as held:
        if not (tables := find_tables(location)):
            yield read_rows(held.enter_context(local_copy(location)), location), lambda index, path: None
            return
        spool = Spool(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="saisa-"))), keep_images)
        held.enter_context(closing(spool))

        def rows() -> Generator[Row]:
            for file in tables:
                with local_copy(file) as copy:
                    yield from map(spool.add, read_table(copy, file))
            if not len(spool):
                raise ValueError(f"{location} holds no rows; it must hold at least one")

        def find(index: int, path: str) -> ImageEntry | None:
            spool.flush()
            return spool.find(index, path)

        yield held.enter_context(closing(rows())), find


def describe(data: dict, locations: Sequence[str], scan: Scan) -> dict:
    """Returns what the manifest tells of the input."""
    names = [_named(name.rstrip("/").rsplit("/", 1)[-1]) for name in locations]
    images = {"names": names, "sha256": scan.images_sha256, "hashed": "paths and sizes, in row order"}
    return {"data": data, "images": images}


def scan_source(
    data: Path,
    name: object,
    images: ImageRoots,
    settings: Settings,
    console: Console,
    special_tokens: Sequence[str] = (),
) -> Scan:
    """Returns the checked rows of `data`, which errors call `name`, showing how far it has got."""
    started, total = time.monotonic(), data.stat().st_size
    with build_task_progress(console) as progress:
        bar = progress.add_task("scan ", total=total, note="")

        def watched() -> Iterator[Row]:
            for row in read_rows(data, name):
                yield row
                if row.index % 1000 == 999:
                    rate = (row.index + 1) / (time.monotonic() - started)
                    progress.update(
                        bar, completed=row.offset, note=f"{count_text(row.index + 1, 'row')}, {rate:,.0f}/s"
                    )
            progress.update(bar, completed=total)

        return scan_rows(watched(), images.find, settings.deduplicate, special_tokens)


def scan_tables(
    files: Sequence[Location],
    location: Location,
    spool: Spool,
    roots: ImageRoots,
    settings: Settings,
    console: Console,
    locations: Sequence[str],
    special_tokens: Sequence[str],
) -> Source:
    """Returns the checked rows of Parquet or Arrow files, with their images in a spool, showing how far it has got.

    Raises:
        ValueError: A file is damaged, or there is no row.
    """
    tables = []
    with build_task_progress(console) as progress:
        bar = progress.add_task("scan ", total=len(files), note="")

        def watched() -> Iterator[Row]:
            for file in files:
                with local_copy(file) as copy:
                    tables.append(Table(file.name, copy.stat().st_size, _sha256(copy), len(spool)))
                    yield from map(spool.add, read_table(copy, file))
                progress.update(
                    bar, advance=1, note=f"{count_text(len(spool), 'row')} of {count_text(len(tables), 'file')}"
                )

        def find(index: int, path: str) -> ImageEntry | None:
            return spool.find(index, path) or roots.find(path)

        scan = scan_rows(watched(), lambda path: find(len(spool) - 1, path), settings.deduplicate, special_tokens)
    if not len(spool):
        raise ValueError(f"{location} holds no rows; it must hold at least one")
    spool.flush()
    digest = hashlib.sha256("\n".join(table.sha256 for table in tables).encode()).hexdigest()
    data = {"name": _named(location.name), "bytes": sum(table.bytes for table in tables), "sha256": digest}
    data["files"] = [table._asdict() for table in tables]
    return Source(_named(location.name), spool.rows, find, scan, describe(data, locations, scan), tuple(tables))


def _named(name: str) -> str:
    """Returns a file's name in UTF-8, whatever the locale; bytes that are none are spelled out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
