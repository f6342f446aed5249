"""The choice of an attention backend, what each refuses, and the block-masked path as far as a CPU runs it."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from model import block_attention, varlen_attention
from model.attention import (
    KERNELS,
    MAX_KEY_EXPANSION,
    attention,
    check_backend,
    choose_backend,
    dense_attention,
    installed_kernels,
    key_expansion,
)
from model.block_attention import BLOCK_SIZE
from model.pack import Pack
from tests.model.packs import LAYOUTS, NUM_TOKENS_PER_IMAGE, PACKS, pack_of, random_layouts
from tests.model.varlen import varlen_reference

BF16, FP32 = torch.bfloat16, torch.float32
EVERYTHING = frozenset(KERNELS)
FEW, MANY = pack_of([(2, 3), (4,)]), pack_of([(1,) * 9])
# fp32: sums of a few hundred terms of size 1, in another order. Worst seen: 6e-7.
TOLERANCE = 1e-5


def dense_mask(pack: Pack) -> torch.Tensor:
    """bool[T, S], the masks of the samples in their places."""
    mask = torch.zeros(len(pack.positions_T), len(pack.key_positions_S), dtype=torch.bool)
    num_visual = sum(pack.visual_lengths)
    text = visual = 0
    for part, t, v in zip(pack.masks, pack.text_lengths, pack.visual_lengths, strict=True):
        mask[text : text + t, visual : visual + v] = part[:, :v]
        mask[text : text + t, num_visual + text : num_visual + text + t] = part[:, v:]
        text, visual = text + t, visual + v
    return mask


def mask_of_function(block_mask: BlockMask) -> torch.Tensor:
    num_text, num_keys = block_mask.seq_lengths
    rows, keys = torch.arange(num_text)[:, None], torch.arange(num_keys)[None, :]
    return block_mask.mask_mod(rows, rows, rows, keys)


def random_qkv(pack: Pack, heads: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_text, num_keys = len(pack.positions_T), len(pack.key_positions_S)
    shapes = [(num_text, heads[0], 16), (num_keys, heads[1], 16), (num_keys, heads[1], 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


LARGE = {
    "several blocks": (random_layouts(7, 12, 4, 60), 0, 0),
    "padded blocks": (random_layouts(8, 12, 4, 60), 13, 50),
    "whole blocks": ([(100, 28), (0, 128)], 0, 0),
    "many images": ([(20,) * 9], 0, 0),
    # keys 0-127 are the image and 64 text tokens: all of rows 128-255 see them, all of rows 256-383 the next 128 too
    "full blocks": ([(5, 379)], 0, 0),
}


@pytest.mark.parametrize("name", PACKS)
def test_the_mask_function_is_the_dense_mask(name):
    layouts, num_text_padding, num_visual_padding = PACKS[name]
    pack = pack_of(layouts, NUM_TOKENS_PER_IMAGE, num_text_padding, num_visual_padding)
    assert torch.equal(mask_of_function(pack.block_mask), dense_mask(pack))


@pytest.mark.parametrize("name", LARGE)
def test_the_block_table_is_the_one_torch_makes_of_the_whole_mask(name):
    layouts, num_text_padding, num_visual_padding = LARGE[name]
    pack = pack_of(layouts, 64, num_text_padding, num_visual_padding)
    ours, num_text, num_keys = pack.block_mask, len(pack.positions_T), len(pack.key_positions_S)
    assert torch.equal(mask_of_function(ours), dense_mask(pack))
    theirs = create_block_mask(ours.mask_mod, None, None, num_text, num_keys, "cpu", BLOCK_SIZE)
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, columns = (getattr(ours, f"{kind}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks")), kind
        assert counts.dtype == columns.dtype == torch.int32
        for row, count in enumerate(counts[0, 0].tolist()):
            expected = getattr(theirs, f"{kind}_indices")[0, 0, row, :count]
            assert torch.equal(columns[0, 0, row, :count], expected), kind
    if name == "full blocks":
        assert ours.full_kv_num_blocks is not None and ours.full_kv_num_blocks.sum() == 3


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("name", ["all layouts", "both paddings", "random 3", *LARGE])
def test_block_attention_is_dense_attention(name, heads):
    layouts, num_text_padding, num_visual_padding = (PACKS | LARGE)[name]
    pack = pack_of(layouts, 64, num_text_padding, num_visual_padding)
    q, k, v = random_qkv(pack, heads)
    found = attention(q, k, v, pack, "block")
    assert found.shape == q.shape
    assert (found - dense_attention(q, k, v, pack)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", PACKS)
def test_the_gradient_of_gathered_rows_is_autograds(name):
    """Independent of the tables of copies: torch's own backward of `index_select`, on whole numbers, so exactly."""
    layouts, num_text_padding, num_visual_padding = PACKS[name]
    segments = pack_of(layouts, NUM_TOKENS_PER_IMAGE, num_text_padding, num_visual_padding).segments
    x = torch.randn(len(segments.last_copies), 1, 2).requires_grad_()
    gradient = torch.arange(2.0 * len(segments.key_indices)).reshape(-1, 1, 2)
    found, expected = varlen_attention._GatheredRows.apply(x, segments), x.index_select(0, segments.key_indices)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(rows, x, gradient)[0] for rows in (found, expected)))


@pytest.mark.parametrize("kernel", ["torch_varlen", "flash_attn"])
def test_flash_kernels_get_the_segments_and_a_causal_mask(kernel, monkeypatch):
    def flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, causal):
        assert causal and (max_q, max_k) == (pack.segments.max_seqlen_q, pack.segments.max_seqlen_k)
        return varlen_reference(q, k, v, replace(pack.segments, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k))

    def torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=True):
        assert enable_gqa
        return flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, causal=window_size == (-1, 0))

    monkeypatch.setattr(varlen_attention, "flash_attn_varlen_func", flash_attn)
    monkeypatch.setattr(varlen_attention, "varlen_attn", torch_varlen)
    pack = pack_of(LAYOUTS, 4, 3, 7)
    inputs = [x.requires_grad_() for x in random_qkv(pack, (4, 2))]
    q, k, v = inputs
    found, expected = varlen_attention.varlen_attention(q, k, v, pack.segments, kernel), dense_attention(q, k, v, pack)
    assert (found - expected).abs().max() <= TOLERANCE
    gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_one_compiled_kernel_serves_packs_of_all_lengths(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    # Without kernels: the tracer alone, whose guards decide when a kernel is compiled again.
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    flex = block_attention._compiled_flex_attention.__wrapped__()
    monkeypatch.setattr(block_attention, "flex_attention", flex)
    with torch.no_grad():
        for seed in range(4):
            pack = pack_of(random_layouts(seed, 12, 4, 60), 64, seed, 3 * seed)
            q, k, v = random_qkv(pack, (4, 2))
            assert (attention(q, k, v, pack, "block") - dense_attention(q, k, v, pack)).abs().max() <= TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "pack", "installed", "expected"),
    [
        ("cpu", FP32, 128, FEW, EVERYTHING, "dense"),
        ("cpu", BF16, 128, MANY, EVERYTHING, "dense"),
        ("cuda", FP32, 128, MANY, EVERYTHING, "dense"),
        ("cuda", BF16, 128, FEW, EVERYTHING, "torch_varlen"),
        ("cuda", torch.float16, 64, FEW, EVERYTHING, "torch_varlen"),
        ("cuda", BF16, 128, FEW, EVERYTHING - {"torch_varlen"}, "flash_attn"),
        ("cuda", BF16, 128, MANY, EVERYTHING, "block"),
        ("cuda", BF16, 128, MANY, EVERYTHING - {"block"}, "torch_varlen"),
        ("cuda", BF16, 8, MANY, EVERYTHING, "torch_varlen"),  # too narrow for block
        ("cuda", BF16, 6, MANY, EVERYTHING, "dense"),
        ("cuda", BF16, 264, FEW, EVERYTHING, "dense"),
    ],
)
def test_auto_chooses(device, dtype, head_dim, pack, installed, expected):
    assert choose_backend(device, dtype, head_dim, pack, installed) == expected


def test_auto_is_block_from_three_images_in_a_sample():
    expansions = [key_expansion(pack_of([(1,) * (num_images + 1)], 576)) for num_images in range(6)]
    assert all(a < b for a, b in pairwise(expansions[1:]))
    assert [e > MAX_KEY_EXPANSION for e in expansions] == [False, False, False, True, True, True]


def test_auto_does_not_become_slow_in_silence():
    with pytest.raises(ValueError, match=r"compute\.attention=auto .* install the extra `gpu`, or use .*=dense"):
        choose_backend("cuda", BF16, 128, FEW, frozenset(["dense", "block"]))


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "installed", "message"),
    [
        ("flash", "cuda", BF16, 128, EVERYTHING, "is unknown; use one of auto, dense, torch_varlen, flash_attn, block"),
        ("torch_varlen", "cpu", BF16, 128, EVERYTHING, "needs a GPU, and the tensors are on cpu"),
        ("flash_attn", "cpu", BF16, 128, EVERYTHING, "needs a GPU"),
        ("flash_attn", "cuda", BF16, 128, EVERYTHING - {"flash_attn"}, "flash-attn, which does not import"),
        ("torch_varlen", "cuda", BF16, 128, EVERYTHING - {"torch_varlen"}, "a torch with flash attention"),
        ("block", "cuda", BF16, 128, EVERYTHING - {"block"}, "the package triton"),
        ("torch_varlen", "cuda", FP32, 128, EVERYTHING, "the model runs in float32; use compute.precision=bf16"),
        ("flash_attn", "cuda", BF16, 100, EVERYTHING, "model.head_dim=100 to be a multiple of 8 up to 256"),
        ("block", "cuda", FP32, 8, EVERYTHING, "model.head_dim=8 to be at least 16"),
        ("block", "cpu", FP32, 128, EVERYTHING, "cannot train without a GPU: FlexAttention has no backward there"),
    ],
)
def test_a_backend_that_cannot_refuses(backend, device, dtype, head_dim, installed, message):
    with pytest.raises(ValueError, match=rf"compute\.attention={backend} .*{re.escape(message)}"):
        check_backend(backend, device, dtype, head_dim, installed)


def test_what_can_run_is_not_refused():
    for backend in ("auto", "dense"):
        check_backend(backend, "cpu", FP32, 6, frozenset())
    for backend in ("torch_varlen", "flash_attn", "block"):
        check_backend(backend, "cuda", BF16, 128, EVERYTHING)
    check_backend("block", "cpu", FP32, 128, EVERYTHING, needs_grad=False)
    assert "dense" in installed_kernels()


def test_refusals_reach_the_caller_and_auto_works_on_this_machine():
    pack = pack_of([(2, 3)])
    q, k, v = (torch.randn(rows, 2, 16).requires_grad_() for rows in (5, 9, 9))
    for backend in ("torch_varlen", "flash_attn", "block"):
        with pytest.raises(ValueError, match=rf"compute\.attention={backend} "):
            attention(q, k, v, pack, backend)
    assert torch.equal(attention(q, k, v, pack), dense_attention(q, k, v, pack))
