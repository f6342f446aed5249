"""What a varlen flash kernel computes, in plain PyTorch: the oracle for `model.segments`."""

import math

import torch
from torch import Tensor

from model.segments import Segments


def varlen_reference(q_TNH: Tensor, k_EGH: Tensor, v_EGH: Tensor, segments: Segments) -> Tensor:
    """Returns [T, N, H]: each sequence by itself, its causal mask aligned to the bottom right."""
    outputs = []
    queries_at, keys_at = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for i in range(len(queries_at) - 1):
        q = q_TNH[queries_at[i] : queries_at[i + 1]]
        k, v = (x[keys_at[i] : keys_at[i + 1]] for x in (k_EGH, v_EGH))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
        is_hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        outputs.append(torch.einsum("nqk,knh->qnh", scores.masked_fill(is_hidden, -math.inf).softmax(-1), v))
    return torch.cat(outputs)
