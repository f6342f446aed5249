"""Reads shards by number and as a plain stream of tars, and compares: `python -m pipeline.shards.stream_check --help`.

By number is how training reads them, through mosaicml-streaming. As a stream is how anything else may, through
`webdataset`, which knows nothing of sidecars and listings. Both must bring the same samples, byte for byte.
"""

from pathlib import Path
from typing import Annotated

import typer

from common.console import run
from common.files import open_location
from data_prep.listings import read_manifest


def main(
    shards: Annotated[str, typer.Argument(help="folder or URL that `make shards` wrote")],
    cache: Annotated[Path | None, typer.Option(help="folder for shards from a URL")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="compare only the first samples, this many")] = None,
) -> None:
    """Compare shards read by number with the same shards read by webdataset."""
    read_manifest(open_location(shards))
    # These take seconds: not before there are shards
    from pipeline.shards.compare import check
    from pipeline.shards.shard_set import ShardSet

    print(check(ShardSet(shards, cache), limit))


if __name__ == "__main__":
    run(main)
