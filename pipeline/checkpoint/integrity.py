"""SHA-256 of every file of a checkpoint: torch notices a cut file, but not a changed byte.

The manifest is megatron-core's `integrity.json`. Its own code lets the first process hash all files while the others
wait, a minute and more for a 7B model; here each process hashes what it wrote, and on reading its share.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch

from common.files import write_whole
from common.json_files import parse_json
from common.paths import within

MANIFEST = "integrity.json"
ALGORITHM = "sha256"
NEEDED = {".metadata", "info.json", "metadata.json"}
NUM_THREADS = 4  # hashing leaves Python's lock


def own_digests(folder: Path, rank: int) -> dict[str, str]:
    """Returns the digests of the files of tensors that a process wrote, by name."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return dict(zip([file.name for file in files], threads.map(_digest, files), strict=True))


def write_manifest(folder: Path, digests: dict[str, str]) -> None:
    """Writes the manifest of a folder: files of tensors as their writers hashed them, the small ones hashed here.

    Raises:
        OSError: A file of tensors was not hashed by who wrote it.
    """
    for file in folder.iterdir():
        if file.suffix == ".distcp" and file.name not in digests:
            raise OSError(f"{file}: the process that wrote it ended before it was done")
    small = {file.name: _digest(file) for file in folder.iterdir() if file.suffix != ".distcp"}
    payload = {"algorithm": ALGORITHM, "files": dict(sorted((digests | small).items()))}
    write_whole(folder / MANIFEST, json.dumps(payload, indent=1).encode())


def damaged_files(folder: Path) -> list[str]:
    """Returns the files of a checkpoint that are not as they were written, on every process of the run.

    All of them call it, and each reads its share of the files.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[]] * num_ranks
    torch.distributed.all_gather_object(found, _damaged_share(folder, rank, num_ranks))
    return sorted(set(chain.from_iterable(found)))


def _damaged_share(folder: Path, rank: int, num_ranks: int) -> list[str]:
    try:
        expected = parse_json(within(folder, MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [MANIFEST]
    if not isinstance(expected, dict) or not expected.keys() >= NEEDED:
        return [MANIFEST]
    unknown = {file.name for pattern in ("*.distcp", "common.pt") for file in folder.glob(pattern)} - expected.keys()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        share = sorted(expected)[rank::num_ranks]
        as_written = threads.map(lambda name: _is_as_written(folder, name, expected[name]), share)
        return [*unknown, *(name for name, is_so in zip(share, as_written, strict=True) if not is_so)]


def _is_as_written(folder: Path, name: str, digest: str) -> bool:
    try:
        file = within(folder, name)
        return file.is_file() and _digest(file) == digest
    except (OSError, ValueError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, ALGORITHM).hexdigest()
