"""Weight names: one table, both directions.

    ours                                        Hugging Face (Llama's names, and those of the authors' release)
    embedding.weight                            model.embed_tokens.weight
    layers.{i}.attention.linear_kv.weight       model.layers.{i}.self_attn.k_proj.weight, ...v_proj.weight
    layers.{i}.mlp.linear_fc1.weight            model.layers.{i}.mlp.gate_proj.weight, ...up_proj.weight
    layers.{i}.projector.fc1.weight             model.layers.{i}.mm_projector.0.weight
    shared_projector.fc1.weight                 model.mm_projector.0.weight (LLaVA's name)
    ...

In stage 1 a model whose layers have projectors has one `shared_projector`, unless it is to train each layer's own; in
Hugging Face terms that is the same projector in every such layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from common.console import count_text
from model.config import ModelConfig
from model.flamingo_weights import new_weights
from model.hf_read import files_in_index, read_safetensors_file
from model.projectors import projector_plan

SHARED = "shared_projector."
GATED = "mlp.linear_fc1.weight"  # gates, then ups: each tensor-parallel rank has a part of both
VOCABULARY = ("embedding.weight", "output.weight")  # filled up with zeros, see `model.parallel`
Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of.

    Several tensors stand together along dim 0, one slice of each in turn, `num_groups` times: once for a gated FFN
    (all gates, then all ups), once per key/value head for keys and values. `num_rows` is how many rows of ours are
    real, where a vocabulary is filled up; an export has `num_image_rows` more, for the image token.
    """

    ours: str
    theirs: tuple[str, ...]
    num_groups: int = 1
    num_rows: int | None = None
    num_image_rows: int = 0

    def join(self, parts: list[Tensor]) -> Tensor:
        """Returns our parameter, made of their tensors.

        Raises:
            ValueError: They have another number of rows than the configuration says.
        """
        if self.num_rows is not None and (num_rows := parts[0].shape[0]) != self.num_rows + self.num_image_rows:
            expected = f"{self.num_rows + self.num_image_rows:,} (vocab_size)"
            raise ValueError(
                f"weight {self.theirs[0]} has {count_text(num_rows, 'row')}, but config.json says {expected}"
            )
        if len(parts) == 1:
            return parts[0][: self.num_rows]
        return torch.cat([part.unflatten(0, (self.num_groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, joined: Tensor) -> list[Tensor]:
        """Returns their tensors, cut from our parameter."""
        if len(self.theirs) == 1:
            return [joined[: self.num_rows]]
        chunks = joined.unflatten(0, (self.num_groups, -1)).chunk(len(self.theirs), dim=1)
        return [chunk.flatten(0, 1) for chunk in chunks]


def name_table(model: ModelConfig, num_image_rows: int = 0) -> list[Entry]:
    """Returns an entry for every parameter of a model as stage 2 trains it.

    Args:
        model: The model.
        num_image_rows: How many rows their vocabulary has beyond the model's, if they are an export's.
    """
    rows: dict[str, Any] = {"num_rows": model.vocab_size, "num_image_rows": num_image_rows}
    entries = [
        Entry("embedding.weight", ("model.embed_tokens.weight",), **rows),
        Entry("final_norm.weight", ("model.norm.weight",)),
    ]
    if not model.tie_embeddings:
        entries.append(Entry("output.weight", ("lm_head.weight",), **rows))
    kinds = ("weight", "bias") if model.qkv_bias else ("weight",)
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        entries += [
            Entry(f"{ours}input_norm.weight", (f"{theirs}input_layernorm.weight",)),
            Entry(f"{ours}post_attention_norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
            Entry(f"{ours}attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",)),
            Entry(f"{ours}mlp.linear_fc1.weight", (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")),
            Entry(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",)),
        ]
        for kind in kinds:
            keys_values = (f"{theirs}self_attn.k_proj.{kind}", f"{theirs}self_attn.v_proj.{kind}")
            entries += [
                Entry(f"{ours}attention.linear_q.{kind}", (f"{theirs}self_attn.q_proj.{kind}",)),
                Entry(f"{ours}attention.linear_kv.{kind}", keys_values, model.num_query_groups),
            ]
        if model.layers[i].is_projected:
            entries += projector_entries(model, f"{ours}projector.", f"{theirs}mm_projector.")
    entries += [Entry(weight.ours, weight.theirs, weight.num_groups) for weight in new_weights(model)]
    if not model.num_own_projectors:
        entries += projector_entries(model, SHARED, "model.mm_projector.")
    return entries


def projector_entries(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """Returns the entries of one projector under the given name prefixes."""
    return [Entry(ours + weight.ours, (theirs + weight.theirs,)) for weight in projector_plan(model).weights]


def spread_shared_projector(state: dict[str, Tensor], model: ModelConfig) -> Iterator[Named]:
    """Yields stage 2's first projectors from stage 1's: a shared one once for each layer that is to have its own."""
    for name, tensor in state.items():
        if not (name.startswith(SHARED) and model.num_own_projectors):
            yield name, tensor
        else:
            for i, kind in enumerate(model.layers):
                if kind.is_projected:
                    yield f"layers.{i}.projector.{name.removeprefix(SHARED)}", tensor


def new_projectors(model: ModelConfig) -> list[str]:
    """Returns the prefixes of the projectors that stage 1 trains, in our names."""
    if model.shares_projector("pretrain"):
        return [SHARED]
    return [f"layers.{i}.projector." for i, kind in enumerate(model.layers) if kind.is_projected]


def random_projectors(model: ModelConfig, prefixes: Iterable[str], seed: int) -> Iterator[Named]:
    """Yields the parameters of new projectors, the same on every machine and at any parallelism.

    Source: `torch.nn.Linear`'s own initialisation, uniform within 1 / sqrt(input features), as LLaVA leaves it; latents
    are normal, as OpenFlamingo's.
    """
    generator = torch.Generator().manual_seed(seed)
    for prefix, weight in product(prefixes, projector_plan(model).weights):
        if weight.value is not None:
            yield prefix + weight.ours, torch.full(weight.shape, weight.value)
        elif weight.fan_in:
            bound = 1 / math.sqrt(weight.fan_in)
            yield prefix + weight.ours, torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
        else:
            yield prefix + weight.ours, torch.empty(weight.shape).normal_(generator=generator)


def from_hf(tensors: Iterable[Named], table: list[Entry]) -> Iterator[Named]:
    """Yields our parameters as soon as the tensors each is made of have come by; others are passed over.

    Raises:
        ValueError: A vocabulary has another size than the table says.
    """
    owner = {name: entry for entry in table for name in entry.theirs}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if entry := owner.get(name):
            parts = waiting.setdefault(entry.ours, {})
            parts[name] = tensor
            if len(parts) == len(entry.theirs):
                yield entry.ours, entry.join([waiting[entry.ours][part] for part in entry.theirs])
                del waiting[entry.ours]


def to_hf(tensors: Iterable[Named], table: list[Entry]) -> Iterator[Named]:
    """Yields the Hugging Face tensors of our parameters.

    Raises:
        KeyError: a parameter is not in the table.
    """
    entries = {entry.ours: entry for entry in table}
    for name, tensor in tensors:
        entry = entries[name]
        yield from zip(entry.theirs, entry.split(tensor), strict=True)


def read_safetensors(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Named]:
    """Yields the wanted tensors of a Hugging Face folder, one at a time.

    Raises:
        ValueError: there are no safetensors in the folder, or damaged ones.
    """
    index = folder / "model.safetensors.index.json"
    for file in files_in_index(index) if index.is_file() else ["model.safetensors"]:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: no such weight file; make a base folder with `make import-hf`")
        yield from read_safetensors_file(folder / file, wanted)


def tensor_parallel_part(
    name: str, whole: Tensor, shape: torch.Size, dim: int | None, tp_rank: int, tp_size: int
) -> Tensor:
    """Returns one tensor-parallel rank's part of a whole parameter, which `dim` divides (None: every rank has it all).

    `shape` is what the rank expects; a vocabulary is filled up with zeros to it.
    """
    if name in VOCABULARY:
        missing = shape[0] * tp_size - whole.shape[0]
        whole = torch.cat([whole, whole.new_zeros(max(missing, 0), *whole.shape[1:])])
    if dim is None or tp_size == 1:
        return whole
    stacked = whole.chunk(2) if name.endswith(GATED) else (whole,)
    return torch.cat([tensor.chunk(tp_size, dim)[tp_rank] for tensor in stacked], dim)


def load_parameters(model: torch.nn.Module, tensors: Iterable[Named], tp_rank: int = 0, tp_size: int = 1) -> None:
    """Copies named whole tensors into the model's parameters, or the part of one tensor-parallel rank.

    Every parameter must come; tensors of other pipeline stages are passed over.

    Raises:
        ValueError: a shape differs, or parameters are left without a value.
    """
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                continue
            parameter = parameters[name]
            is_divided = getattr(parameter, "tensor_model_parallel", False)
            dim = cast(Any, parameter).partition_dim if is_divided else None
            part = tensor_parallel_part(name, tensor, parameter.shape, dim, tp_rank, tp_size)
            if parameter.shape != part.shape:
                raise ValueError(
                    f"weight {name}: the model has shape {list(parameter.shape)}, the file {list(part.shape)}"
                )
            if hasattr(parameter, "get_high_precision_init_val"):  # Transformer Engine's, of a weight in 8 bits
                part = part.to(parameter.dtype)  # as it would be in 16 bits
                # The optimizer's fp32 weight starts from it; kept on the host until then.
                cast(Any, parameter)._high_precision_init_val = part.cpu()
            parameter.copy_(part)
            missing.discard(name)
    if missing:
        raise ValueError(
            f"{count_text(len(missing), 'weight')} found in no file, such as {sorted(missing)[0]}; "
            "is the base folder complete?"
        )
