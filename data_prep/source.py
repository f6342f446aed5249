"""The input of a sharding run: its rows, read once and checked, and its images, found but not read."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.files import local_copy, open_location
from data_prep.image_roots import ImageRoots, open_images
from data_prep.json_rows import Row, read_rows
from data_prep.plan import Scan, Settings, scan_rows
from data_prep.reporting import build_task_progress


@dataclass(frozen=True)
class Source:
    """Scanned input: the rows, here as a local file whatever `name` they have, and the images they mean."""

    name: str
    rows: Path
    images: ImageRoots
    scan: Scan
    description: dict


@contextmanager
def open_source(
    data: str | Path, images: str | Path | Sequence[str | Path], settings: Settings, console: Console
) -> Iterator[Source]:
    """Yields the input with every row checked and every image found.

    Raises:
        ValueError: The rows are no list of rows, or a root of the images is not there.
    """
    locations = [str(location) for location in ([images] if isinstance(images, str | Path) else images)]
    location, roots = open_location(data), open_images(locations)
    with local_copy(location) as rows:
        scan = scan_source(rows, location, roots, settings, console)
        description = {
            "data": {"name": location.name, "bytes": rows.stat().st_size, "sha256": _sha256(rows)},
            "images": {
                "names": [name.rstrip("/").rsplit("/", 1)[-1] for name in locations],
                "sha256": scan.images_sha256,
                "hashed": "paths and sizes, in row order",
            },
        }
        yield Source(location.name, rows, roots, scan, description)


def scan_source(data: Path, name: object, images: ImageRoots, settings: Settings, console: Console) -> Scan:
    """Returns the checked rows of `data`, which errors call `name`, showing how far it has got."""
    started, total = time.monotonic(), data.stat().st_size
    with build_task_progress(console) as progress:
        bar = progress.add_task("scan ", total=total, note="")

        def watched() -> Iterator[Row]:
            for row in read_rows(data, name):
                yield row
                if row.index % 1000 == 999:
                    rate = (row.index + 1) / (time.monotonic() - started)
                    progress.update(bar, completed=row.offset, note=f"{row.index + 1:,} rows, {rate:,.0f}/s")
            progress.update(bar, completed=total)

        return scan_rows(watched(), images.find, settings.deduplicate)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
