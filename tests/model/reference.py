"""SAISA and its family in plain PyTorch, one sample at a time, from the equations alone: what fast paths are held to.

An architecture is a rule for each layer, (where visual tokens come from, what they pass on the way up):

    ("features", "nothing")   SAISA
    ("below", "ffn")          NAAViT
    ("below", "all")          LLaVA
    ("below", "nothing")      a frozen layer of ShortV
    ("nowhere", "nothing")    a layer of Flamingo's language model; `before_layer` is where its blocks run

With no layer that takes features, `model.mm_projector` stands in front of the first. Nothing is left out because
nobody reads it. Weights are a dict with Hugging Face names. Nothing here is shared with the code under test.
"""

import math
from collections.abc import Callable, Sequence

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
    rules: Sequence[tuple[str, str]] | None = None,
    before_layer: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns [t, V] for one sample: t text tokens at `positions`, features [i, C] at `visual_positions`.

    A `trace` gets under "states" what goes into each layer and the final, normed state [t, D], and under "weights" the
    attention weights [heads, t, i + t] of each layer, their keys in order of position.
    """
    rules = rules or [("features", "nothing")] * model.num_layers
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

    def standard(x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    def resampled(latents: Tensor, image: Tensor, name: str) -> Tensor:
        size = latents.shape[1]
        heads = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(size // 64, 1))
        queries = apply(standard(latents), f"{name}.query").chunk(heads, dim=1)
        keys = apply(standard(image), f"{name}.key").chunk(heads, dim=1)
        values = apply(standard(image), f"{name}.value").chunk(heads, dim=1)
        gathered = [
            (q @ k.T / math.sqrt(size / heads)).softmax(-1) @ v for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return latents + apply(torch.cat(gathered, dim=1), f"{name}.output")

    def project(name: str) -> Tensor:
        if model.projector == "mlp":
            return apply(gelu(apply(features, f"{name}.0")), f"{name}.2")
        if model.projector == "resampler":
            images = features.split(model.vision.num_tokens) if len(features) else []
            latents = weights[f"{name}.0.latents"]
            tokens = [apply(standard(resampled(latents, image, f"{name}.0")), f"{name}.1") for image in images]
            return torch.cat([features.new_zeros(0, model.hidden_size), *tokens])
        return apply(features, name)

    key_positions = torch.cat([visual_positions, positions])
    num_visual = len(visual_positions)
    repeat = model.num_attention_heads // model.num_query_groups
    state = weights["model.embed_tokens.weight"][tokens]
    visual = project("model.mm_projector") if "below" in dict(rules) and "features" not in dict(rules) else features
    if "nowhere" in dict(rules):
        visual = state[:0]
    for i, (source, update) in enumerate(rules):
        layer = f"model.layers.{i}."
        trace["states"].append(state)
        if before_layer is not None:
            state = before_layer(i, state)
        if source == "features":
            visual = project(f"{layer}mm_projector")
        both = norm(torch.cat([visual, state]), f"{layer}input_layernorm.weight")
        first_asking = 0 if update == "all" else num_visual
        asking_positions = key_positions[first_asking:]
        queries, keys, values = (
            apply(rows, f"{layer}self_attn.{name}_proj").unflatten(-1, (-1, model.head_dim))
            for name, rows in (("q", both[first_asking:]), ("k", both), ("v", both))
        )
        queries, keys = rope(queries, asking_positions), rope(keys, key_positions)
        keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
        scores = torch.einsum("tnh,snh->nts", queries, keys) / math.sqrt(model.head_dim)
        scores = scores.masked_fill(asking_positions[:, None] < key_positions[None, :], -math.inf)
        attention = scores.softmax(-1)
        trace["weights"].append(attention[:, -len(state) :, key_positions.argsort()])
        gathered = apply(torch.einsum("nts,snh->tnh", attention, values).flatten(1), f"{layer}self_attn.o_proj")
        rows = torch.cat([visual, state])[first_asking:] + gathered
        if update == "ffn":
            rows = torch.cat([visual, rows])
        x = norm(rows, f"{layer}post_attention_layernorm.weight")
        rows = rows + apply(
            silu(apply(x, f"{layer}mlp.gate_proj")) * apply(x, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj"
        )
        state = rows[-len(state) :]
        visual = visual if update == "nothing" else rows[:num_visual]
    state = norm(state, "model.norm.weight")
    trace["states"].append(state)
    head = weights["model.embed_tokens.weight"] if model.tie_embeddings else weights["lm_head.weight"]
    return linear(state, head)


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy of the targets of one sample."""
    return cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
