"""Cross-attention of text to images: which rows of images each text token sees, and the attention itself.

A text token sees the images before it, all of them or the latest alone. Visual tokens stand in order of sample and
position. The sample `a <image> b <image> c d`, with 2 visual tokens an image:

    text   all before it   the latest
    a      . . . .         . . . .       sees none: its output is zero
    b      1 1 . .         1 1 . .
    c, d   1 1 1 1         . . 1 1

There is no causal mask and no rotary position. Tokens that see the same images form a segment, as in `model.segments`.

Dims: T text tokens, Q those that see an image, I visual tokens, N query heads, G key/value heads, H head dim.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention import Kernel, check_backend, choose_backend, installed_kernels
from model.pack import Pack
from model.segments import Segments, segments_of
from model.transfer import copy_together
from model.varlen_attention import varlen_attention


@dataclass(frozen=True)
class SeenImages:
    """Which visual tokens of a pack each text token sees: those from its first up to its last, in a row.

    Attributes:
        first_T: int64[T] the first.
        end_T: int64[T] the one behind the last.
        rows_Q: int64[Q] the text rows that see any.
        segments: of these rows, with visual tokens as keys.
    """

    first_T: Tensor
    end_T: Tensor
    rows_Q: Tensor
    segments: Segments

    @property
    def sees_T(self) -> Tensor:
        """bool[T] whether a token sees any."""
        return self.end_T > self.first_T

    def to(self, device: torch.device) -> "SeenImages":
        """Returns a copy of one that is in host memory, on `device`, where no kernel is waited for."""
        own = {name: getattr(self, name) for name in ("first_T", "end_T", "rows_Q")}
        parts = {name: getattr(self.segments, name) for name in Segments.TENSORS}
        moved = copy_together(own | parts, device)
        segments = replace(self.segments, **{name: moved[name] for name in parts})
        return SeenImages(moved["first_T"], moved["end_T"], moved["rows_Q"], segments)


def seen_images(pack: Pack, latest_alone: bool) -> SeenImages:
    """Returns what each text token of a pack sees, on its device; worked out once a pack.

    Args:
        pack: The pack.
        latest_alone: Of the images before it, a token sees the last.
    """
    key = f"seen_images {latest_alone}"
    if key not in vars(pack):
        found = _seen_images(pack, latest_alone)
        vars(pack)[key] = found if pack.on_cpu is pack else found.to(pack.positions_T.device)
    return vars(pack)[key]


def _seen_images(pack: Pack, latest_alone: bool) -> SeenImages:
    ranges = pack.key_ranges
    first_T, end_T = ranges.visual_start_T, ranges.visual_end_T
    if latest_alone:
        first_T = np.maximum(first_T, end_T - pack.num_tokens_per_image)
    rows_Q = np.flatnonzero(end_T > first_T)
    first_Q, end_Q = first_T[rows_Q], end_T[rows_Q]
    begins = np.ones(len(rows_Q), dtype=bool)
    begins[1:] = (np.diff(first_Q) != 0) | (np.diff(end_Q) != 0)
    starts = np.flatnonzero(begins)
    segments = segments_of(
        num_queries=np.diff(np.append(starts, len(rows_Q))),
        firsts=first_Q[starts][:, None],
        counts=(end_Q - first_Q)[starts][:, None],
        num_rows=ranges.num_visual,
    )
    first, end, rows = (torch.from_numpy(array) for array in (first_T, end_T, rows_Q))
    return SeenImages(first, end, rows, segments)


def cross_attention(
    q_TNH: Tensor, k_IGH: Tensor, v_IGH: Tensor, pack: Pack, seen: SeenImages, backend: str = "auto"
) -> Tensor:
    """Returns [T, N, H]: what each text token gathers from the images that it sees, zero where there is none.

    Raises:
        ValueError: The backend cannot do it.
    """
    if not len(seen.rows_Q):  # every input keeps a part in the result, and so every weight a gradient
        return q_TNH * 0 + k_IGH[:0].sum() + v_IGH[:0].sum()
    if (kernel := _kernel(q_TNH, pack, backend)) == "dense":
        return _dense(q_TNH, k_IGH, v_IGH, pack, seen)
    assert kernel != "block"
    q_QNH = q_TNH.index_select(0, seen.rows_Q)
    out_QNH = varlen_attention(q_QNH, k_IGH, v_IGH, seen.segments, kernel, is_causal=False)
    return torch.zeros_like(q_TNH).index_copy(0, seen.rows_Q, out_QNH)


def _kernel(q_TNH: Tensor, pack: Pack, backend: str) -> Kernel:
    device, dtype, head_dim = q_TNH.device.type, q_TNH.dtype, q_TNH.shape[-1]
    if backend == "auto":
        return choose_backend(device, dtype, head_dim, pack.text_alone, installed_kernels())
    check_backend(backend, device, dtype, head_dim, installed_kernels())
    return backend  # pyright: ignore[reportReturnType]


def _dense(q_TNH: Tensor, k_IGH: Tensor, v_IGH: Tensor, pack: Pack, seen: SeenImages) -> Tensor:
    """Returns what `cross_attention` does, with one mask a sample: what a flash kernel is tested against."""
    k_INH, v_INH = (x.repeat_interleave(q_TNH.shape[1] // x.shape[1], dim=1) for x in (k_IGH, v_IGH))
    outputs, start = [], 0
    parts = (x.split(pack.text_lengths) for x in (q_TNH, seen.first_T, seen.end_T))
    for q, first, end, count in zip(*parts, pack.image_counts, strict=True):
        stop = start + count * pack.num_tokens_per_image
        if count:
            rows = torch.arange(start, stop, device=q.device)
            sees = (rows >= first[:, None]) & (rows < end[:, None])
            sees_any = (end > first)[:, None]  # a row of a softmax must not be empty: these see all, and count for zero
            heads = (x.transpose(0, 1)[None] for x in (q, k_INH[start:stop], v_INH[start:stop]))
            out = scaled_dot_product_attention(*heads, attn_mask=sees | ~sees_any)[0].transpose(0, 1)
            outputs.append(out * sees_any[..., None])
        else:
            outputs.append(q * 0)
        start = stop
    return torch.cat(outputs)
