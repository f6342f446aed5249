"""SAISA in plain PyTorch, one sample at a time, written from the equations alone: the oracle for every fast path.

Weights are a dict with Hugging Face names. Nothing here is shared with the code under test.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, linear, silu

from model.config import ModelConfig


def reference_logits(
    weights: dict[str, Tensor],
    model: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    features: Tensor,
    visual_positions: Tensor,
    trace: dict[str, list[Tensor]] | None = None,
) -> Tensor:
    """Returns [t, V] for one sample: t text tokens at `positions`, features [i, C] at `visual_positions`.

    A `trace` gets under "states" what goes into each layer and the final, normed state [t, D], and under "weights" the
    attention weights [heads, t, i + t] of each layer, their keys in order of position.
    """
    trace = {} if trace is None else trace
    trace |= {"states": [], "weights": []}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.norm_epsilon) * weights[name]

    def apply(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rope(x: Tensor, at: Tensor) -> Tensor:
        half = model.head_dim // 2
        frequency = model.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        turn = torch.polar(torch.ones(len(at), half, dtype=x.dtype), at[:, None] * frequency)
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn[:, None, :]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    key_positions = torch.cat([visual_positions, positions])
    repeat = model.num_attention_heads // model.num_query_groups
    state = weights["model.embed_tokens.weight"][tokens]
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        trace["states"].append(state)
        if model.projector == "mlp":
            visual = apply(gelu(apply(features, f"{layer}mm_projector.0")), f"{layer}mm_projector.2")
        else:
            visual = apply(features, f"{layer}mm_projector")
        x = norm(state, f"{layer}input_layernorm.weight")
        u = norm(visual, f"{layer}input_layernorm.weight")
        both = torch.cat([u, x])
        queries = rope(apply(x, f"{layer}self_attn.q_proj").view(len(x), -1, model.head_dim), positions)
        keys = rope(apply(both, f"{layer}self_attn.k_proj").view(len(both), -1, model.head_dim), key_positions)
        values = apply(both, f"{layer}self_attn.v_proj").view(len(both), -1, model.head_dim)
        keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
        scores = torch.einsum("tnh,snh->nts", queries, keys) / math.sqrt(model.head_dim)
        scores = scores.masked_fill(positions[:, None] < key_positions[None, :], -math.inf)
        attention = scores.softmax(-1)
        trace["weights"].append(attention[:, :, key_positions.argsort()])
        gathered = torch.einsum("nts,snh->tnh", attention, values).flatten(1)
        state = state + apply(gathered, f"{layer}self_attn.o_proj")
        x = norm(state, f"{layer}post_attention_layernorm.weight")
        state = state + apply(
            silu(apply(x, f"{layer}mlp.gate_proj")) * apply(x, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj"
        )
    state = norm(state, "model.norm.weight")
    trace["states"].append(state)
    head = weights["model.embed_tokens.weight"] if model.tie_embeddings else weights["lm_head.weight"]
    return linear(state, head)


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy of the targets of one sample."""
    return cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
