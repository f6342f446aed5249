"""NAAViT attention: text asks, text and images answer (arXiv 2502.02458, section 3).

A text token attends to every visual and text token of its own sample at or before its position; visual tokens issue no
queries. `dense_attention` is the reference: one dense mask a sample, on any device, with gradients.

Dims: T text tokens, S = I + T keys (all visual tokens of the pack, then all text), N query heads, G key/value heads,
H head dim, t and s one sample's share of T and S.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.pack import Pack


def dense_attention(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, pack: Pack) -> Tensor:
    """Returns [T, N, H]: for each text token the values it attends to. Samples never see one another."""
    # Heads are repeated here, not by `enable_gqa`: with that, torch's CPU kernel falls back to several slow operations.
    k_SNH, v_SNH = (x.repeat_interleave(q_TNH.shape[1] // x.shape[1], dim=1) for x in (k_SGH, v_SGH))
    queries, keys, values = q_TNH.split(pack.text_lengths), keys_by_sample(k_SNH, pack), keys_by_sample(v_SNH, pack)
    outputs = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0].transpose(0, 1)
        for q, k, v, mask in zip(queries, keys, values, pack.masks, strict=True)
    ]
    return torch.cat(outputs)


def keys_by_sample(x_SGH: Tensor, pack: Pack) -> list[Tensor]:
    """Returns each sample's rows [s, G, H] of keys or values, visual before text."""
    visual, text = x_SGH.split([sum(pack.visual_lengths), sum(pack.text_lengths)])
    return [
        torch.cat(parts) for parts in zip(visual.split(pack.visual_lengths), text.split(pack.text_lengths), strict=True)
    ]


def rotary_table(positions_S: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines, each fp32[S, 1, H], that turn features at `positions_S`.

    Source: RoPE (arXiv 2104.09864) in Llama's layout, which pairs feature j with feature j + H/2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_S.device) / head_dim
    angles = torch.outer(positions_S.float(), theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x_SNH: Tensor, cos_S1H: Tensor, sin_S1H: Tensor) -> Tensor:
    """Returns `x_SNH` turned by its rotary angles, in its own precision."""
    first, second = x_SNH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_SNH * cos_S1H.to(x_SNH.dtype) + turned * sin_S1H.to(x_SNH.dtype)
