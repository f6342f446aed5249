"""Reads checkpoints as data. A checkpoint may come from anywhere, and torch and megatron-core read parts by pickle.

    .metadata               a pickle: where each tensor lies         `read_metadata`, which knows the classes that needs
    objects in *.distcp     `torch.load` with weights_only=False     forced to weights_only=True
    tensors in *.distcp     `torch.load` with weights_only=True      as it is
    common.pt               of older versions; `torch.load`          forced to weights_only=True

`check_data` looks at all of it before anything is loaded, so that one process says what is wrong; `data_only` makes
torch and megatron-core themselves read in the same way.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from common.paths import within
from common.pickles import read_pickle, tell

FORCE, FORCE_NO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""The first of these variables makes every `torch.load` read data alone, the second undoes it."""
FILE_NAME = re.compile(r"__[0-9]+_[0-9]+\.distcp")
CLASSES = [BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties]
CLASSES += [TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo]
KNOWN = {(kind.__module__, kind.__name__): kind for kind in CLASSES}
KNOWN |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
KNOWN |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}


@contextmanager
def data_only() -> Iterator[None]:
    """Makes torch and megatron-core read data alone from checkpoints while the block runs."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NO)}
    reader_class: Any = FileSystemReader
    torchs_own = reader_class.read_metadata

    def read(reader: Any, *_: Any, **__: Any) -> Metadata:
        found = read_metadata(Path(reader.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = reader.load_id
        return found

    os.environ[FORCE] = "1"
    reader_class.read_metadata = read
    try:
        yield
    finally:
        reader_class.read_metadata = torchs_own
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_data(folder: Path) -> None:
    """Makes sure that a checkpoint holds data alone, in its own files.

    Raises:
        ValueError: It does not; the message names the file and what is strange in it.
        OSError: A file cannot be read.
    """
    found = read_metadata(folder)
    with data_only():
        if (common := folder / "common.pt").exists():
            _check_object(common.name, within(folder, common.name).read_bytes())
        for index, info in found.storage_data.items():
            if isinstance(found.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with within(folder, info.relative_path).open("rb") as file:
                    file.seek(info.offset)
                    _check_object(info.relative_path, file.read(info.length))


def read_metadata(folder: Path) -> Metadata:
    """Returns where the tensors and objects of a checkpoint lie.

    Raises:
        ValueError: The file is damaged, names what it has no use for, or places outside the checkpoint's files.
        OSError: It cannot be read.
    """
    with within(folder, ".metadata").open("rb") as file:
        try:
            found = read_pickle(file, KNOWN)
            _check_entries(folder, found)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f".metadata: {error}") from None
    return found


def _check_entries(folder: Path, found: Any) -> None:
    """Refuses what torch would stumble over, or follow out of the folder."""
    if type(found) is not Metadata:
        raise ValueError(f"it holds a {type(found).__name__}")
    kinds, sizes = found.state_dict_metadata, {}
    for name, kind in kinds.items():
        if type(kind) is TensorStorageMetadata:
            places = [kind.size, *(part for chunk in kind.chunks for part in (chunk.offsets, chunk.sizes))]
            numbers = [number for place in places for number in place]
            if type(kind.properties.dtype) is not torch.dtype or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{name!r} has no type or size")
        elif type(name) is not str or type(kind) is not BytesStorageMetadata:
            raise ValueError(f"{name!r} is neither tensor nor object")
    for index, info in found.storage_data.items():
        name = info.relative_path
        if type(index) is not MetadataIndex or index.fqn not in kinds or info.transform_descriptors:
            raise ValueError(f"it places {index} in {name!r}")
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"it looks for tensors in {name!r}, which is no file of a checkpoint")
        if name not in sizes:
            sizes[name] = within(folder, name).stat().st_size
        if not (info.offset >= 0 and 0 < info.length <= sizes[name] - info.offset):
            raise ValueError(f"it looks for {index.fqn!r} behind the end of {name}")


def _check_object(name: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # of zip files, of pickles, of what they are called with
        raise ValueError(f"{name}: {tell(error)}") from None
