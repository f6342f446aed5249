"""Files of a Hugging Face folder: complete or not there, weights in shards.

Everything is written to `<folder>.part` and takes its name at the end, so a folder that exists is complete. Tensors
come as an iterator and leave in shards, so that no model is ever whole in memory.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.console import count_text
from common.files import named_errors
from model.hf_check import check_new_folder

MAX_SHARD_BYTES = 2_000_000_000  # held in memory before a file is written
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `folder` at the end; after an error nothing is left.

    Raises:
        ValueError: `folder` holds something.
        OSError: it could not be written.
    """
    check_new_folder(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        with named_errors(part):
            part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_weights(
    part: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> torch.dtype:
    """Writes shards and their index; returns the dtype of the embedding, which stands for the model's."""
    shard: dict[str, Tensor] = {}
    names_of_shards: list[list[str]] = []
    shard_bytes = total_bytes = 0
    stored_dtype = dtype or torch.float32

    def flush() -> None:
        nonlocal shard, shard_bytes
        file = part / f"shard-{len(names_of_shards)}.safetensors"
        with named_errors(file):  # safetensors' own error is none of the system's
            save_file(shard, file, metadata={"format": "pt"})
        names_of_shards.append(list(shard))
        shard, shard_bytes = {}, 0

    missing = dict(shapes)
    for name, tensor in tensors:
        if name not in missing:
            problem = "comes twice" if name in shapes else "is not a weight of this model"
            raise ValueError(f"{name} {problem}; is the checkpoint of another kind?")
        if tensor.shape != missing.pop(name):
            raise ValueError(f"{name} has shape {list(tensor.shape)}; the configuration says {list(shapes[name])}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is stored as {tensor.dtype}; quantised checkpoints are not supported")
        # A copy, because safetensors refuses tensors that share memory (one projector copied to every layer).
        shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        stored_dtype = shard[name].dtype if name.endswith("embed_tokens.weight") else stored_dtype
        shard_bytes += shard[name].nbytes
        total_bytes += shard[name].nbytes
        if shard_bytes >= max_shard_bytes:
            flush()
    if missing:
        shown = ", ".join(list(missing)[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"{len(missing)} of {count_text(len(shapes), 'weight')} missing: {shown}")
    if shard:
        flush()

    weight_map = {}
    for number, names in enumerate(names_of_shards):
        file = f"model-{number + 1:05d}-of-{len(names_of_shards):05d}.safetensors"
        (part / f"shard-{number}.safetensors").rename(part / file)
        weight_map |= dict.fromkeys(names, file)
    index = part / "model.safetensors.index.json"
    with named_errors(index):
        write_json(index, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    for file in part.glob("*.safetensors"):
        shutil.copymode(index, file)  # safetensors lets only the owner read
    return stored_dtype


def write_json(file: Path, content: Any) -> None:
    """Writes one of a folder's JSON files."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
