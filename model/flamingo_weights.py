"""The weights that `flamingo` adds to a language model: names, shapes, and how new ones start.

    ours                                         Hugging Face
    layers.{i}.block.attention.linear_q.weight   model.layers.{i}.cross_attention.q_proj.weight
    layers.{i}.block.attention_gate              model.layers.{i}.cross_attention.attention_gate
    ...

What stands in front of them, a resampler or a projector, is in `model.projectors`.
"""

from math import prod
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.hf.family_saisa import FFN_WIDTHS, HEAD_DIM, NUM_HEADS

Start = Literal["linear", "ones", "zeros"]


class Weight(NamedTuple):
    """One weight.

    Fields:
        ours: its name.
        theirs: the Hugging Face tensors that it is made of, as `model.weights.Entry` says.
        shape: of the whole.
        start: how a new one starts: as in `torch.nn.Linear`, at ones, or at zeros.
        num_groups: as `model.weights.Entry` says.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    start: Start = "linear"
    num_groups: int = 1


def block_weights(model: ModelConfig, layer: int) -> list[Weight]:
    """Returns the weights of the block before a layer."""
    d, ours, theirs = model.hidden_size, f"layers.{layer}.block.", f"model.layers.{layer}.cross_attention."
    attention = f"{ours}attention."
    if model.cross_attention == "open_flamingo":
        weights = [
            *_norm(f"{ours}attention_norm", f"{theirs}attention_norm", d),
            *_attention(attention, theirs, d, model.vision.hidden_size),
            *_ffn(ours, theirs, d),
        ]
    else:
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        gates_and_ups = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        weights = [
            Weight(f"{ours}attention_norm.weight", (f"{theirs}attention_norm.weight",), (d,), "ones"),
            Weight(f"{ours}ffn_norm.weight", (f"{theirs}ffn_norm.weight",), (d,), "ones"),
            *_projections(attention, theirs, d, queries, keys, d, model.num_query_groups),
            Weight(f"{attention}q_layernorm.weight", (f"{theirs}q_norm.weight",), (model.head_dim,), "ones"),
            Weight(f"{attention}k_layernorm.weight", (f"{theirs}k_norm.weight",), (model.head_dim,), "ones"),
            Weight(f"{ours}mlp.linear_fc1.weight", gates_and_ups, (2 * model.ffn_hidden_size, d)),
            Weight(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), (d, model.ffn_hidden_size)),
        ]
    gates = ("attention_gate", "ffn_gate")
    return weights + [Weight(f"{ours}{gate}", (f"{theirs}{gate}",), (1,), "zeros") for gate in gates]


def new_weights(model: ModelConfig) -> list[Weight]:
    """Returns the weights of all blocks; none of other architectures."""
    blocks = [i for i, kind in enumerate(model.layers) if kind.shown == "block"]
    return [weight for layer in blocks for weight in block_weights(model, layer)]


def num_block_parameters(model: ModelConfig) -> int:
    """Returns how many parameters all blocks have."""
    return sum(prod(weight.shape) for weight in new_weights(model))


def _norm(ours: str, theirs: str, width: int) -> list[Weight]:
    """Returns the weights of a LayerNorm."""
    starts: dict[str, Start] = {"weight": "ones", "bias": "zeros"}
    return [Weight(f"{ours}.{kind}", (f"{theirs}.{kind}",), (width,), start) for kind, start in starts.items()]


def _projections(
    ours: str, theirs: str, width: int, queries: int, keys: int, key_width: int, num_groups: int
) -> list[Weight]:
    keys_values = (f"{theirs}k_proj.weight", f"{theirs}v_proj.weight")
    return [
        Weight(f"{ours}linear_q.weight", (f"{theirs}q_proj.weight",), (queries, width)),
        Weight(f"{ours}linear_kv.weight", keys_values, (2 * keys, key_width), num_groups=num_groups),
        Weight(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",), (width, queries)),
    ]


def _attention(ours: str, theirs: str, width: int, key_width: int) -> list[Weight]:
    return _projections(ours, theirs, width, NUM_HEADS * HEAD_DIM, NUM_HEADS * HEAD_DIM, key_width, NUM_HEADS)


def _ffn(ours: str, theirs: str, width: int) -> list[Weight]:
    """Returns the weights of OpenFlamingo's FFN, with the norm before it."""
    return [
        *_norm(f"{ours}ffn_norm", f"{theirs}ffn_norm", width),
        Weight(f"{ours}fc1.weight", (f"{theirs}fc1.weight",), (FFN_WIDTHS * width, width)),
        Weight(f"{ours}fc2.weight", (f"{theirs}fc2.weight",), (width, FFN_WIDTHS * width)),
    ]
