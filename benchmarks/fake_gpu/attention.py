"""Attention kernels that are compiled or not installed here, and the FLOPs of those whose work depends on values.

flash-attn has a stand-in, and so has FlexAttention in its compiled form, the only one that a GPU is to run. Torch's own
flash kernel needs none. All three are checked at the call for what their kernels want; offsets and tables have no
values here, so what they say is taken from the pack that is traced. FLOPs are those of full rectangles: of each
segment's queries and keys, or of the blocks that are visited; backward makes five products of forward's two.

Dims: T text tokens, S keys, E keys of all segments, N query heads, G key/value heads, H head dim.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.flop_counter import flop_registry

import model.attention
import model.block_attention
import model.varlen_attention
from benchmarks.fake_gpu.recorder import Recorder
from model.block_attention import BLOCK_SIZE, block_table
from model.pack import Pack

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rectangles:
    """What attention works on in a pack.

    Attributes:
        offsets: lengths of the offsets of queries and of keys.
        num_rows: T and E.
        longest: queries and keys of the longest segment of each.
        num_pairs: how many queries meet how many keys in all segments.
        num_block_pairs: the same in all blocks that are visited, since some query in them sees some key.
    """

    offsets: tuple[int, int]
    num_rows: tuple[int, int]
    longest: tuple[int, int]
    num_pairs: int
    num_block_pairs: int

    @classmethod
    def of(cls, pack: Pack) -> Self:
        """Returns those of a pack, which must be asked for where tensors have values."""
        both = [np.diff(getattr(pack.segments, name).numpy()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
        queries, keys = both
        some_QJ, _ = block_table(pack.key_ranges)
        return cls(
            offsets=(len(queries) + 1, len(keys) + 1),
            num_rows=(int(queries.sum()), int(keys.sum())),
            longest=(int(queries.max()), int(keys.max())),
            num_pairs=int((queries.astype(np.int64) * keys).sum()),
            num_block_pairs=int(some_QJ.sum()) * BLOCK_SIZE**2,
        )


class _Traced:
    """What is traced, by the number of rows that ask, and torch's own function."""

    recorder: Recorder
    rectangles: ClassVar[dict[int, Rectangles]]
    varlen_attn = staticmethod(model.varlen_attention.varlen_attn)


def install(recorder: Recorder, pack: Pack) -> None:
    """Lets the model's attention run on packs of the shape of `pack`, in every backend, and `recorder` see it."""
    everything = pack.in_order.pack  # for layers in which visual tokens ask
    _Traced.recorder = recorder
    _Traced.rectangles = {len(each.positions_T): Rectangles.of(each) for each in (everything, pack)}
    model.varlen_attention.varlen_attn = _torch_varlen
    model.varlen_attention.flash_attn_varlen_func = _flash_attn
    model.attention.HAVE_FLASH_ATTN = True
    model.block_attention._compiled_flex_attention = lambda: _flex
    flop_registry[torch.ops.torch_attn._varlen_attn] = lambda q, *_, **__: _flops(q, _num_pairs(q))
    flop_registry[torch.ops.torch_attn._varlen_attn_backward] = lambda grad, *_, **__: _flops(
        grad, _num_pairs(grad), num_products=5
    )


def _num_pairs(q_TNH: Tensor) -> int:
    return _Traced.rectangles[len(q_TNH)].num_pairs


def _flops(q: Tensor, pairs: int, num_products: int = 2) -> int:
    num_heads, head_dim = (q.shape[1], q.shape[3]) if q.dim() == 4 else q.shape[1:]
    return 2 * num_products * pairs * num_heads * head_dim


def check_varlen(
    q_TNH: Tensor, k_EGH: Tensor, v_EGH: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> None:
    """Makes sure of what FlashAttention-2's C++ checks, and what its kernels take for granted."""
    assert q_TNH.dtype == k_EGH.dtype == v_EGH.dtype and q_TNH.dtype in HALF, (q_TNH.dtype, k_EGH.dtype, v_EGH.dtype)
    assert all(x.is_cuda and x.stride(-1) == 1 and x.dim() == 3 for x in (q_TNH, k_EGH, v_EGH))
    assert k_EGH.shape == v_EGH.shape and k_EGH.shape[-1] == q_TNH.shape[-1] <= 256 and q_TNH.shape[-1] % 8 == 0
    assert q_TNH.shape[1] % k_EGH.shape[1] == 0, (q_TNH.shape, k_EGH.shape)
    assert all(x.is_cuda and x.dtype == torch.int32 and x.is_contiguous() for x in (cu_q, cu_k))
    found = Rectangles((len(cu_q), len(cu_k)), (len(q_TNH), len(k_EGH)), (max_q, max_k), 0, 0)
    expected = replace(_Traced.rectangles[len(q_TNH)], num_pairs=0, num_block_pairs=0)
    assert found == expected, (found, expected)


def _torch_varlen(*args: Any, **kwargs: Any) -> Any:
    check_varlen(*args)
    assert kwargs["window_size"] == (-1, 0)
    return _Traced.varlen_attn(*args, **kwargs)


def _flash_attn(*args: Any, causal: bool) -> Tensor:
    check_varlen(*args)
    assert causal
    return _Attention.apply("flash_attn_varlen", _num_pairs(args[0]), *args[:3])


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
    assert q.dtype == k.dtype == v.dtype and all(x.is_cuda and x.stride(-1) == 1 and x.dim() == 4 for x in (q, k, v))
    assert q.shape[1] == k.shape[1] or enable_gqa
    assert tuple(block_mask.seq_lengths) == (q.shape[2], k.shape[2]) and k.shape == v.shape
    num_q, num_k = (-(-length // BLOCK_SIZE) for length in block_mask.seq_lengths)
    parts = {
        "kv_num_blocks": (num_q,),
        "kv_indices": (num_q, num_k),
        "q_num_blocks": (num_k,),
        "q_indices": (num_k, num_q),
    }
    for name, shape in {**parts, **{f"full_{name}": shape for name, shape in parts.items()}}.items():
        table = getattr(block_mask, name)
        assert table.is_cuda and table.dtype == torch.int32 and table.is_contiguous(), name
        assert table.shape == (1, 1, *shape), (name, table.shape, shape)
    rows = [cell.cell_contents for cell in block_mask.mask_mod.__closure__ or ()]
    assert [row.shape for row in rows] == 4 * [q.shape[2:3]] and all(row.is_cuda for row in rows)
    return _Attention.apply("flex_attention", _Traced.rectangles[q.shape[2]].num_block_pairs, q, k, v)


class _Attention(torch.autograd.Function):
    """An attention kernel by its name: what it makes, and what it keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, name: str, pairs: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns a tensor like `q`; the log-sum-exp of each row and head is kept besides."""
        out, log_sum_exp = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        _Traced.recorder.add("kernel", name, [q, k, v], [out, log_sum_exp], flops=_flops(q, pairs))
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.name, ctx.pairs = name, pairs
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Returns the gradients of queries, keys and values."""
        saved = ctx.saved_tensors
        assert grad.is_cuda and grad.dtype == saved[0].dtype and grad.stride(-1) == 1
        made = [torch.empty_like(x) for x in saved[:3]]
        flops = _flops(grad, ctx.pairs, num_products=5)
        _Traced.recorder.add("kernel", f"{ctx.name}_backward", [grad, *saved], made, flops=flops)
        return None, None, *made
