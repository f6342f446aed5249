"""Compares shards as they are read by number and by webdataset: what `make stream-check` does."""

import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from typing import Any

from webdataset.compat import WebDataset
from webdataset.gopen import gopen_schemes

from common.console import count_text
from common.files import open_location
from pipeline.shards.shard_set import ShardSet

type Sample = tuple[str, dict[str, bytes]]
"""Its key, and its members by name."""


def check(shards: ShardSet, limit: int | None = None) -> str:
    """Returns a line that says what is the same.

    Raises:
        ValueError: Something is not; names the first difference.
    """
    counted = shards.manifest.num_samples
    pairs = zip_longest(by_number(shards), by_webdataset(shards))
    num_same = 0
    for found, streamed in islice(pairs, limit):
        if difference := compare(found, streamed):
            raise ValueError(f"{shards.location}: sample {num_same}: {difference}")
        num_same += 1
    if num_same != (expected := min(counted, limit or counted)):
        raise ValueError(f"{shards.location}: {count_text(num_same, 'sample')}, but manifest.json counts {expected:,}")
    return (
        f"{shards.location}: {num_same:,} of {count_text(counted, 'sample')}, the same by number and through webdataset"
    )


def compare(by_number: Sample | None, streamed: Sample | None) -> str | None:
    """Returns the first difference between what two readers make of a sample, None if there is none."""
    if by_number is None or streamed is None:
        return f"only {'webdataset' if by_number is None else 'reading by number'} has it"
    (key, members), (other_key, others) = by_number, streamed
    if key != other_key:
        return f"key {key} by number, {other_key} through webdataset"
    if [*members] != [*others]:
        return f"key {key}: members {[*members]} by number, {[*others]} through webdataset"
    differing = next((name for name in members if members[name] != others[name]), None)
    return differing and f"key {key}: the bytes of {differing} differ"


def by_number(shards: ShardSet) -> Iterator[Sample]:
    """Yields every sample in order, read by its number."""
    number = 0
    for shard in range(len(shards.shard_sizes)):
        for key in shards.keys(shard):
            yield key, shards.members(number)
            number += 1


def by_webdataset(shards: ShardSet) -> Iterator[Sample]:
    """Yields every sample in order, from the tars alone."""
    gopen_schemes.update(s3=_open_url, gs=_open_url)  # its own need command-line tools
    tars = [f"{shards.location.rstrip('/')}/{reader.raw_data.basename}" for reader in shards.readers]
    samples: Iterable[dict[str, Any]] = WebDataset(tars, shardshuffle=False)
    try:
        for sample in samples:
            yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}
    except tarfile.TarError as error:
        raise ValueError(f"{shards.location}: webdataset cannot read it: {error}") from None


def _open_url(url: str, mode: str = "rb", bufsize: int = 0) -> Any:
    return open_location(url).open(mode)
