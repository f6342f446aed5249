"""Block-masked attention over a whole pack: torch's FlexAttention, for samples with many images.

A varlen call gathers the keys before an image again for the text behind it; with m images in a sample that is about
(m + 1) / 2 copies of its keys. Here every key stands once: the mask is a function of two rows, and a table says which
blocks of 128 queries x 128 keys are empty (never visited), full (no mask applied) or mixed. The table comes from the
pack's key ranges on the CPU, so no T x S mask is ever built and the GPU is never waited for.

FlexAttention must be compiled on CUDA, or it builds the whole score matrix; on CPU it has no backward, so there it
runs as it is, forward only.

Dims: T text tokens, I visual tokens, S = I + T keys, J blocks of keys, N query heads, G key/value heads, H head dim.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.segments import KeyRanges

BLOCK_SIZE = 128  # rows and keys; FlexAttention's own default, a multiple of every tile its kernels use


def build_block_mask(ranges: KeyRanges, device: torch.device) -> BlockMask:
    """Returns the mask of a pack on `device`, for queries [1, N, T, H] and keys [1, G, S, H]."""
    some_QJ, all_QJ = block_table(ranges)
    mixed_QJ = some_QJ & ~all_QJ
    kv, full_kv, q, full_q = (
        [_move(tensor, device) for tensor in ordered(table)] for table in (mixed_QJ, all_QJ, mixed_QJ.T, all_QJ.T)
    )
    bounds = (ranges.visual_start_T, ranges.visual_end_T, ranges.text_start_T + ranges.num_visual)
    own_row_T = np.arange(ranges.num_visual, ranges.num_keys)
    rows = [_move(torch.from_numpy(bound.astype(np.int32)), device) for bound in (*bounds, own_row_T)]
    return BlockMask(
        seq_lengths=(len(ranges.text_start_T), ranges.num_keys),
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=mask_function(*rows),
    )


def mask_function(
    visual_start_T: Tensor, visual_end_T: Tensor, text_start_T: Tensor, own_row_T: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Returns the function that says whether text row `query` attends to row `key` of S.

    All are int32[T], rows of S: a token sees [visual_start, visual_end) and [text_start, own_row]. A kernel is compiled
    once for all packs, so everything that changes from pack to pack is a tensor here, and none a view of another.
    """

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visual = (visual_start_T[query] <= key) & (key < visual_end_T[query])
        text = (text_start_T[query] <= key) & (key <= own_row_T[query])
        return visual | text

    return attends


def block_table(ranges: KeyRanges) -> tuple[np.ndarray, np.ndarray]:
    """Returns bool[Q, J] twice, for Q blocks of queries: true where some pair is to be seen, and where all are."""
    num_text = len(ranges.text_start_T)
    own_row_T = np.arange(num_text) + ranges.num_visual
    first_J = np.arange(0, ranges.num_keys, BLOCK_SIZE, dtype=np.int32)

    def overlap_TJ(start_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
        starts_T1, ends_T1 = start_T.astype(np.int32)[:, None], end_T.astype(np.int32)[:, None]
        return np.maximum(np.minimum(ends_T1, first_J + BLOCK_SIZE) - np.maximum(starts_T1, first_J), 0)

    num_seen_TJ = overlap_TJ(ranges.visual_start_T, ranges.visual_end_T)
    num_seen_TJ += overlap_TJ(ranges.text_start_T + ranges.num_visual, own_row_T + 1)
    starts = np.arange(0, num_text, BLOCK_SIZE)
    least_QJ, most_QJ = (reduce.reduceat(num_seen_TJ, starts, axis=0) for reduce in (np.minimum, np.maximum))
    all_QJ = least_QJ == BLOCK_SIZE
    if num_text % BLOCK_SIZE:
        all_QJ[-1] = False  # a block that queries do not fill is masked, as torch's own tables have it
    return most_QJ > 0, all_QJ


def ordered(table_QJ: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns int32[1, 1, Q] true entries of each row, and int32[1, 1, Q, J] their columns first, then the others."""
    counts = table_QJ.sum(axis=1).astype(np.int32)
    columns = np.argsort(~table_QJ, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(columns)[None, None]


def block_attention(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, block_mask: BlockMask) -> Tensor:
    """Returns [T, N, H]; compiled on the first call on a GPU, once for all lengths."""
    flex = _compiled_flex_attention() if q_TNH.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_SGH, v_SGH))
    out_1NTH = flex(q, k, v, block_mask=block_mask, enable_gqa=q_TNH.shape[1] != k_SGH.shape[1])
    assert isinstance(out_1NTH, Tensor)  # a pair only where the log-sum-exp was asked for
    return out_1NTH[0].transpose(0, 1)


@cache
def _compiled_flex_attention() -> Callable:
    # One kernel for packs of all lengths; fullgraph: an error, where otherwise it would run uncompiled after a warning.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
