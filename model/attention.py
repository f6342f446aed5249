"""NAAViT attention: text asks, text and images answer (arXiv 2502.02458, section 3).

A text token attends to every visual and text token of its own sample at or before its position; visual tokens issue no
queries. `attention` computes that, with one of the backends of `compute.attention`:

    dense          torch's scaled_dot_product_attention and a mask for each sample: the reference, on any device
    torch_varlen   one flash call over all segments of the pack (`model.segments`); CUDA, 16 bits
    flash_attn     the same with the kernels of the flash-attn package
    block          block-masked FlexAttention: every key once, for samples with many images; CUDA to train
    auto           one of these, see `choose_backend`

A backend that cannot do what is asked refuses; none falls back to another.

Dims: T text tokens, S = I + T keys (all visual tokens of the pack, then all text), N query heads, G key/value heads,
H head dim, t and s one sample's share of T and S. Under tensor parallelism N and G are this rank's heads.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.block_attention import block_attention
from model.pack import Pack
from model.varlen_attention import HAVE_FLASH_ATTN, varlen_attention

Rotary = tuple[Tensor, ...]  # see `rotary_table`
Kernel = Literal["dense", "torch_varlen", "flash_attn", "block"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
HALF = (torch.bfloat16, torch.float16)
# A varlen call gathers, and keeps until the backward pass, the keys and values of every segment. Where that is more
# than twice what the pack has, `block`, which takes each where it is, should win: with n images and text between them,
# all in one sample, from n = 3 on. Reasoned, see docs/benchmarks.md; never measured.
MAX_KEY_EXPANSION = 2.0


def attention(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, pack: Pack, backend: str = "auto") -> Tensor:
    """Returns [T, N, H]: for each text token the values it attends to. Samples never see one another.

    Raises:
        ValueError: The backend cannot do it: device, precision, head dim, or a package that is missing.
    """
    device, dtype, head_dim = q_TNH.device.type, q_TNH.dtype, q_TNH.shape[-1]
    if backend == "auto":
        kernel = choose_backend(device, dtype, head_dim, pack, installed_kernels())
    else:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_SGH, v_SGH))
        check_backend(backend, device, dtype, head_dim, installed_kernels(), needs_grad)
        kernel = cast(Kernel, backend)
    if kernel == "dense":
        return dense_attention(q_TNH, k_SGH, v_SGH, pack)
    if kernel == "block":
        return block_attention(q_TNH, k_SGH, v_SGH, pack.block_mask)
    return varlen_attention(q_TNH, k_SGH, v_SGH, pack.segments, kernel)


def choose_backend(device: str, dtype: torch.dtype, head_dim: int, pack: Pack, installed: frozenset[Kernel]) -> Kernel:
    """Returns what `auto` means for a pack.

    On a GPU in 16 bits a flash kernel: torch's own where there is one, since it is the same FlashAttention-2 and comes
    with every head dim, else the package's; `block` where `MAX_KEY_EXPANSION` is exceeded. Everywhere else `dense`.

    Raises:
        ValueError: A GPU could run a flash kernel and none is installed.
    """
    if device != "cuda" or dtype not in HALF or _wrong_head_dim("torch_varlen", head_dim):
        return "dense"
    if "block" in installed and not _wrong_head_dim("block", head_dim) and key_expansion(pack) > MAX_KEY_EXPANSION:
        return "block"
    for kernel in ("torch_varlen", "flash_attn"):
        if kernel in installed:
            return kernel
    raise ValueError(
        "compute.attention=auto finds no flash kernel for this GPU: torch is built without one and flash-attn is not "
        "installed; install the extra `gpu`, or use compute.attention=dense, which is slow"
    )


def key_expansion(pack: Pack) -> float:
    """Returns how many keys a varlen call gathers for every key that the pack has."""
    return len(pack.on_cpu.segments.key_indices) / pack.key_ranges.num_keys


def check_backend(
    backend: str, device: str, dtype: torch.dtype, head_dim: int, installed: frozenset[Kernel], needs_grad: bool = True
) -> None:
    """Makes sure that a backend can run; `auto` finds one that can.

    Raises:
        ValueError: It cannot; the message says why, and the way out.
    """
    if backend == "auto":
        return
    if backend not in KERNELS:
        raise ValueError(f"compute.attention={backend} is unknown; use one of auto, {', '.join(KERNELS)}")
    if problem := _refusal(cast(Kernel, backend), device, dtype, head_dim, installed, needs_grad):
        raise ValueError(f"compute.attention={backend} {problem}, or use compute.attention=auto")


def _refusal(
    kernel: Kernel, device: str, dtype: torch.dtype, head_dim: int, installed: frozenset[Kernel], needs_grad: bool
) -> str | None:
    """Returns why `kernel` cannot run and what else to do, or nothing."""
    if kernel == "dense":
        return None
    if kernel == "block" and device != "cuda":
        return "cannot train without a GPU: FlexAttention has no backward there; run on a GPU" if needs_grad else None
    if device != "cuda":
        return f"needs a GPU, and the tensors are on {device}; run on a GPU"
    if kernel not in installed:
        missing = {
            "flash_attn": "the package flash-attn, which does not import here; install the extra `gpu`",
            "torch_varlen": "a torch with flash attention, and this one is built without; install another torch",
            "block": "the package triton, which is not installed; install it",
        }
        return f"needs {missing[kernel]}"
    if kernel != "block" and dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        return f"works in 16 bits, and the model runs in {name}; use compute.precision=bf16"
    if rule := _wrong_head_dim(kernel, head_dim):
        return f"needs model.head_dim={head_dim} to be {rule}; use another model"
    return None


def _wrong_head_dim(kernel: Kernel, head_dim: int) -> str | None:
    """Returns the rule that `head_dim` breaks, if it does."""
    if kernel == "block":
        return "at least 16" if head_dim < 16 else None
    return "a multiple of 8 up to 256" if head_dim % 8 or head_dim > 256 else None


@cache
def installed_kernels() -> frozenset[Kernel]:
    """Returns the kernels whose code is on this machine, whatever its devices."""
    found: dict[Kernel, bool] = {
        "dense": True,
        "torch_varlen": torch.backends.cuda.is_flash_attention_available(),
        "flash_attn": HAVE_FLASH_ATTN,
        "block": find_spec("triton") is not None,
    }
    return frozenset(kernel for kernel, is_there in found.items() if is_there)


def dense_attention(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, pack: Pack) -> Tensor:
    """Returns [T, N, H] from one dense mask a sample: what every other backend is tested against."""
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


def rotary_table(
    positions_S: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32, is_fused: bool = False
) -> Rotary:
    """Returns what turns features at `positions_S`: cosines and sines, each [S, 1, H], or fp32 angles if `is_fused`.

    Cosines and sines are computed in fp32 and rounded to `dtype`; in that of the features, all layers keep one table
    and no copies. The fused kernel computes them from the angles.
    Source: RoPE (arXiv 2104.09864) in Llama's layout, which pairs feature j with feature j + H/2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_S.device) / head_dim
    angles = torch.outer(positions_S.float(), theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return (angles,) if is_fused else (angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_SNH: Tensor, rotary_S1H: Rotary) -> Tensor:
    """Returns `x_SNH` turned by its rotary angles, in its own precision."""
    if len(rotary_S1H) == 1:
        assert fused_apply_rotary_pos_emb is not None
        return fused_apply_rotary_pos_emb(x_SNH[:, None], rotary_S1H[0][:, None]).squeeze(1)
    cos_S1H, sin_S1H = rotary_S1H
    first, second = x_SNH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_SNH * cos_S1H.to(x_SNH.dtype) + turned * sin_S1H.to(x_SNH.dtype)
