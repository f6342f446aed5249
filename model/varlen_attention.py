"""Variable-length flash attention over the segments of a pack: FlashAttention-2 of torch, or of the flash-attn package.

Both align the causal mask to the bottom right where a sequence has more keys than queries, which is what
`model.segments` relies on, take grouped key/value heads as they are, and run on CUDA in 16-bit precision only.

Dims: T text tokens, S keys, E keys of all segments, N query heads, G key/value heads, H head dim.
"""

from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model.segments import Segments

try:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
except ImportError:  # an optional dependency, built against one torch: absent, or built against another
    flash_attn_varlen_func = None

HAVE_FLASH_ATTN = flash_attn_varlen_func is not None
# torch 2.11 groups heads without being asked; later versions want to be.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class _GatheredRows(torch.autograd.Function):
    """The keys (or values) of all segments.

    Nearly every row has one copy, so its gradient is taken from there. Autograd would fill a tensor with zeros, and add
    every copy to it.
    """

    @staticmethod
    def forward(ctx: Any, x_SGH: Tensor, segments: Segments) -> Tensor:
        """Returns [E, G, H]."""
        ctx.segments = segments
        return x_SGH.index_select(0, segments.key_indices)

    @staticmethod
    def backward(ctx: Any, grad_EGH: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of the rows [S, G, H]."""
        segments: Segments = ctx.segments
        grad_SGH = grad_EGH.index_select(0, segments.last_copies)
        if len(segments.unseen_rows):
            grad_SGH.index_fill_(0, segments.unseen_rows, 0)
        if len(segments.repeats):
            grad_SGH.index_add_(0, segments.repeated_rows, grad_EGH.index_select(0, segments.repeats))
        return grad_SGH, None


def varlen_attention(
    q_TNH: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    segments: Segments,
    kernel: Literal["torch_varlen", "flash_attn"],
    is_causal: bool = True,
) -> Tensor:
    """Returns [T, N, H]. The gathered keys and values, not those of S, are what is kept for the backward pass."""
    k_EGH, v_EGH = (_GatheredRows.apply(x, segments) for x in (k_SGH, v_SGH))
    offsets = (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k)
    if kernel == "flash_attn":
        assert flash_attn_varlen_func is not None
        return flash_attn_varlen_func(q_TNH, k_EGH, v_EGH, *offsets, causal=is_causal)
    # torch calls causal a window: everything to the left, nothing to the right of the (bottom-right) diagonal.
    window = (-1, 0) if is_causal else (-1, -1)
    out_TNH = varlen_attn(q_TNH, k_EGH, v_EGH, *offsets, window_size=window, **_GROUPED)
    assert isinstance(out_TNH, Tensor)  # a pair only where the log-sum-exp was asked for
    return out_TNH
