"""Every attention kernel against the dense reference, forward and all gradients, on a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model.attention import attention, choose_backend, dense_attention, installed_kernels
from model.pack import Pack
from tests.model.packs import LAYOUTS, pack_of, random_layouts

pytestmark = pytest.mark.gpu

KERNELS = ["torch_varlen", "flash_attn", "block"]
# name: (samples, tokens per image, padding of text rows, padding of visual rows)
PACKS = {
    "every small layout": (LAYOUTS, 4, 0, 0),
    "one image each": ([(35, 60 + 7 * i) for i in range(12)], 576, 0, 0),
    "text only": ([(300,), (1,), (77,)], 576, 0, 0),
    "many images": ([(20, 0, 1, 40, 3, 60), (7,) * 9], 144, 0, 0),
    "both paddings": ([(35, 200), (0, 90)], 576, 19, 32),
    "visual padding, no text with it": ([(31, 33)], 20, 0, 12),
    **{f"random {seed}": (random_layouts(seed, 10, 5, 200), 64, seed, 16 * seed) for seed in range(3)},
}


def need(kernel: str) -> None:
    if kernel not in installed_kernels():
        pytest.skip(f"needs {kernel}: the package is not installed")


def random_inputs(pack: Pack, heads: tuple[int, int], head_dim: int, device: torch.device) -> list[Tensor]:
    """Queries, keys, values, and the gradient of the output; bf16 numbers held in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    num_text, num_keys = len(pack.positions_T), len(pack.key_positions_S)
    shapes = [(num_text, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_text, heads[0])]
    return [torch.randn(*s, head_dim, generator=generator, device=device).bfloat16().float() for s in shapes]


def outputs(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of queries, keys and values, in fp32."""
    *qkv, gradient = (x.to(dtype) for x in inputs)
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = function(*qkv)
    return [x.float() for x in (out.detach(), *torch.autograd.grad(out, qkv, gradient))]


@pytest.mark.parametrize(("heads", "head_dim"), [((8, 8), 128), ((8, 2), 128), ((8, 1), 64)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_the_dense_reference(kernel, heads, head_dim, gpu):
    need(kernel)
    for name, arguments in PACKS.items():
        pack = pack_of(*arguments).to(gpu)
        inputs = random_inputs(pack, heads, head_dim, gpu)
        exact = outputs(partial(dense_attention, pack=pack), inputs, torch.float32)
        rounded = outputs(partial(dense_attention, pack=pack), inputs, torch.bfloat16)
        found = outputs(partial(attention, pack=pack, backend=kernel), inputs, torch.bfloat16)
        for what, ours, dense, truth in zip(("output", "dq", "dk", "dv"), found, rounded, exact, strict=True):
            # The reference in bf16 errs by rounding alone, and no kernel rounds at the same places: three times that,
            # and for keys that several segments share a rounding more (2**-8) for each, of which few are large.
            allowed = 3 * (dense - truth).abs().max() + 2**-7 * truth.abs().max()
            worst = (ours - truth).abs().max()
            assert worst <= allowed, f"{name}, {what}: off by {worst:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_gets_no_gradient_and_gives_no_nan(kernel, gpu):
    need(kernel)
    pack = pack_of([(35, 60)], 64, 33, 32).to(gpu)
    inputs = random_inputs(pack, (4, 2), 64, gpu)
    out, _, dk, dv = outputs(partial(attention, pack=pack, backend=kernel), inputs, torch.bfloat16)
    assert all(x.isfinite().all() for x in (out, dk, dv))
    assert not dk[64:96].any() and not dv[64:96].any()


@pytest.mark.parametrize("kernel", ["torch_varlen", "flash_attn"])
def test_the_host_never_waits_for_the_gpu(kernel, gpu):
    need(kernel)

    def run(seed: int) -> None:
        pack = pack_of(random_layouts(seed, 10, 5, 200), 64).to(gpu)
        shapes = [(len(pack.positions_T), 4), (len(pack.key_positions_S), 2), (len(pack.key_positions_S), 2)]
        inputs = [torch.ones(*s, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        attention(*inputs, pack=pack, backend=kernel).sum().backward()

    run(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_uses_a_flash_kernel_and_agrees_with_it(gpu):
    pack = pack_of([(35, 100)] * 3, 576).to(gpu)
    kernel = choose_backend("cuda", torch.bfloat16, 128, pack, installed_kernels())
    assert kernel in ("torch_varlen", "flash_attn")
    q, k, v, _ = [x.bfloat16() for x in random_inputs(pack, (8, 2), 128, gpu)]
    assert torch.equal(attention(q, k, v, pack, "auto"), attention(q, k, v, pack, kernel))
    many = pack_of([(20,) * 9], 144).to(gpu)
    assert choose_backend("cuda", torch.bfloat16, 128, many, installed_kernels()) == "block"


def test_fp32_is_refused_by_flash_kernels_and_dense_by_auto(gpu):
    pack = pack_of([(3, 4)]).to(gpu)
    q, k, v, _ = random_inputs(pack, (4, 2), 64, gpu)
    with pytest.raises(ValueError, match="compute.precision=bf16"):
        attention(q, k, v, pack, "torch_varlen")
    assert torch.equal(attention(q, k, v, pack, "auto"), dense_attention(q, k, v, pack))
