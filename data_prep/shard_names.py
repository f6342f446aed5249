"""What a listing of shards may call its files. Listings come from outside, and their names become paths."""

import re
from collections.abc import Iterable
from typing import Any

TAR_NAME = re.compile(r"(shard-[0-9]{6,12})\.tar")
"""As `plan.shard_name` writes them."""


def check_shard_names(listed: Iterable[tuple[Any, Any]]) -> None:
    """Makes sure that the names (tar, sidecar) in a listing are those of shards, each once, and no other paths.

    Raises:
        ValueError: One is not; the message names it, in ASCII.
    """
    seen = set()
    for tar, sidecar in listed:
        found = TAR_NAME.fullmatch(tar) if isinstance(tar, str) else None
        if not found:
            raise ValueError(f"{_shown(tar)} is no name of a shard such as shard-000000.tar")
        if sidecar != f"{found[1]}.json":
            raise ValueError(f"{_shown(sidecar)} is not the name of the sidecar of {tar}")
        if tar in seen:
            raise ValueError(f"{tar} is listed twice")
        seen.add(tar)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
