"""Flamingo's blocks in plain PyTorch, one text token at a time, from the equations alone.

Weights are a dict with Hugging Face names. Nothing here is shared with the code under test.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from model.config import ModelConfig
from tests.model.reference import reference_logits

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(x: Tensor, weights: Weights, name: str, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weights[f"{name}.weight"]


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [N, H] over keys and values [k, N, H]."""
    scores = torch.einsum("nh,knh->nk", query, keys) / math.sqrt(query.shape[-1])
    return torch.einsum("nk,knh->nh", scores.softmax(-1), values).flatten()


def resampled(weights: Weights, features: Tensor) -> Tensor:
    """Latents of width C from the features [P, C] of one image."""
    latents = weights["model.mm_projector.latents"]
    for layer in range(6):
        name = f"model.mm_projector.layers.{layer}."
        x = layer_norm(latents, weights, f"{name}latent_norm")
        both = torch.cat([layer_norm(features, weights, f"{name}feature_norm"), x])
        q, k, v = (
            linear(rows, weights[f"{name}{n}_proj.weight"]).unflatten(-1, (8, 64))
            for n, rows in (("q", x), ("k", both), ("v", both))
        )
        gathered = torch.stack([attend(query, k, v) for query in q])
        latents = latents + linear(gathered, weights[f"{name}o_proj.weight"])
        x = layer_norm(latents, weights, f"{name}ffn_norm")
        latents = latents + linear(gelu(linear(x, weights[f"{name}fc1.weight"])), weights[f"{name}fc2.weight"])
    return layer_norm(latents, weights, "model.mm_projector.norm")


def open_flamingo(weights: Weights, name: str, state: Tensor, latents: list[Tensor], before: Sequence[int]) -> Tensor:
    """The block behind which `before[t]` of the images stand before text token t."""
    rows = []
    for x, count in zip(state, before, strict=True):
        if count:
            query = linear(layer_norm(x, weights, f"{name}attention_norm"), weights[f"{name}q_proj.weight"])
            k, v = (linear(latents[count - 1], weights[f"{name}{n}_proj.weight"]).unflatten(-1, (8, 64)) for n in "kv")
            gathered = linear(attend(query.unflatten(-1, (8, 64)), k, v), weights[f"{name}o_proj.weight"])
            x = x + torch.tanh(weights[f"{name}attention_gate"]) * gathered
        inner = gelu(linear(layer_norm(x, weights, f"{name}ffn_norm"), weights[f"{name}fc1.weight"]))
        rows.append(x + torch.tanh(weights[f"{name}ffn_gate"]) * linear(inner, weights[f"{name}fc2.weight"]))
    return torch.stack(rows)


def llama_3_2(
    weights: Weights, model: ModelConfig, name: str, state: Tensor, visual: list[Tensor], before: Sequence[int]
) -> Tensor:
    """The same; `visual` are the tokens [P, D] of each image."""
    epsilon, heads = model.norm_epsilon, (-1, model.head_dim)
    repeat = model.num_attention_heads // model.num_query_groups
    rows = []
    for x, count in zip(state, before, strict=True):
        if not count:
            rows.append(x)
            continue
        query = linear(rms_norm(x, weights, f"{name}attention_norm", epsilon), weights[f"{name}q_proj.weight"])
        query = rms_norm(query.unflatten(-1, heads), weights, f"{name}q_norm", epsilon)
        seen = torch.cat(visual[:count])
        k, v = (linear(seen, weights[f"{name}{n}_proj.weight"]).unflatten(-1, heads) for n in "kv")
        k = rms_norm(k, weights, f"{name}k_norm", epsilon)
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        gathered = linear(attend(query, k, v), weights[f"{name}o_proj.weight"])
        x = x + torch.tanh(weights[f"{name}attention_gate"]) * gathered
        inner = rms_norm(x, weights, f"{name}ffn_norm", epsilon)
        gate, up = (linear(inner, weights[f"{name}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        down = linear(silu(gate) * up, weights[f"{name}mlp.down_proj.weight"])
        rows.append(x + torch.tanh(weights[f"{name}ffn_gate"]) * down)
    return torch.stack(rows)


def blocks(weights: Weights, model: ModelConfig, images: list[Tensor], before: Sequence[int]) -> Callable:
    """What runs before layer i, for `reference_logits`; `images` are features [P, C]."""

    def project(features: Tensor) -> Tensor:
        def apply(x: Tensor, name: str) -> Tensor:
            return linear(x, weights[f"model.mm_projector.{name}weight"], weights[f"model.mm_projector.{name}bias"])

        return apply(features, "") if model.projector == "linear" else apply(gelu(apply(features, "0.")), "2.")

    is_open = model.cross_attention == "open_flamingo"
    visual = [resampled(weights, image) if is_open else project(image) for image in images]

    def before_layer(layer: int, state: Tensor) -> Tensor:
        name = f"model.layers.{layer}.cross_attention."
        if (layer + 1) % (model.cross_attention_every or 1):
            assert not any(weight.startswith(name) for weight in weights)
            return state
        if is_open:
            return open_flamingo(weights, name, state, visual, before)
        return llama_3_2(weights, model, name, state, visual, before)

    return before_layer


def flamingo_logits(
    weights: Weights,
    model: ModelConfig,
    tokens: Tensor,
    images: list[Tensor],
    before: Sequence[int],
    trace: dict[str, list[Tensor]] | None = None,
) -> Tensor:
    """Returns [t, V] for one sample, of whose images `before[t]` stand before text token t."""
    nothing, at = torch.zeros(0, model.hidden_size, dtype=torch.float64), torch.arange(len(tokens))
    rules = [("nowhere", "nothing")] * model.num_layers
    run = blocks(weights, model, images, before)
    return reference_logits(weights, model, tokens, at, nothing, at[:0], trace, rules, run)


def flamingo_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The weights that blocks and a resampler add, by Hugging Face name."""
    every = model.cross_attention_every or 1
    d, c, f, is_open = (
        model.hidden_size,
        model.vision.hidden_size,
        model.ffn_hidden_size,
        model.cross_attention == "open_flamingo",
    )
    q, kv = (
        (8 * 64, 8 * 64)
        if is_open
        else (n * model.head_dim for n in (model.num_attention_heads, model.num_query_groups))
    )

    def norms(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{kind}": (width,) for kind in (("weight", "bias") if is_open else ("weight",))}

    def heads(name: str, width: int, seen: int) -> dict[str, tuple[int, ...]]:
        shapes = {"q": (q, width), "k": (kv, seen), "v": (kv, seen), "o": (width, q)}
        return {f"{name}{n}_proj.weight": shape for n, shape in shapes.items()}

    def ffn(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}fc1.weight": (4 * width, width), f"{name}fc2.weight": (width, 4 * width)}

    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(every - 1, model.num_layers, every):
        name = f"model.layers.{layer}.cross_attention."
        shapes |= norms(f"{name}attention_norm", d) | norms(f"{name}ffn_norm", d) | heads(name, d, c if is_open else d)
        shapes |= {f"{name}attention_gate": (1,), f"{name}ffn_gate": (1,)}
        if is_open:
            shapes |= ffn(name, d)
        else:
            shapes |= {f"{name}q_norm.weight": (model.head_dim,), f"{name}k_norm.weight": (model.head_dim,)}
            shapes |= {f"{name}mlp.{n}_proj.weight": (f, d) for n in ("gate", "up")}
            shapes |= {f"{name}mlp.down_proj.weight": (d, f)}
    if is_open:
        shapes |= {"model.mm_projector.latents": (model.resampler_tokens, c)} | norms("model.mm_projector.norm", c)
        for layer in range(6):
            name = f"model.mm_projector.layers.{layer}."
            for norm in ("feature_norm", "latent_norm", "ffn_norm"):
                shapes |= norms(f"{name}{norm}", c)
            shapes |= heads(name, c, c) | ffn(name, c)
    return shapes
