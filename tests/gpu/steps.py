"""One forward and backward pass of a small model, to compare precisions, kernels and layer classes with one another.

Every size is one that FP8 can multiply: features in multiples of 128, text rows and visual rows in multiples of 32.
"""

from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from model.compute import build_transformer_config, compute_dtype
from model.config import ComputeConfig, ModelConfig, VisionConfig
from model.flops import Phase
from model.pack import IGNORE_INDEX, Pack
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from pipeline.optimizer import freeze
from tests.model.packs import pack_of

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=512,
    ffn_hidden_size=1024,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=128,
    vocab_size=500,
    max_positions=512,
    vision=VisionConfig(hidden_size=256, num_layers=2, image_size=112, patch_size=14),
)
# Relative, in the Euclidean norm of a tensor, for the two layers of MODEL. Bf16 against fp32 on a CPU, dense: losses
# 2e-3, worst gradient 0.026 (queries: small differences of large numbers). A flash kernel rounds at other places.
BF16_BOUNDS = {"losses": 6e-3, "gradients": 0.06}
# FP8 against bf16, emulated on a CPU by rounding both inputs of every product to E4M3, and gradients to E5M2, under one
# scale a tensor: worst loss 0.024, worst gradient 0.27. What is computed wrongly is off by about 1.
FP8_BOUNDS = {"losses": 0.04, "gradients": 0.4}
NUM_TOKENS = MODEL.vision.num_tokens  # 64
# name: (samples, padding of text rows, padding of visual rows)
PACKS = {
    "images": ([(35, 60), (0, 90), (20, 3, 41), (50,)], 21, 32),
    "text only": ([(33,), (63,)], 0, 32),
    "no visual rows": ([(33,), (60,)], 0, 0),  # what bf16 makes of a pack without images; FP8 always has rows
}


def random_inputs(name: str) -> tuple[Pack, Tensor]:
    """Returns a pack of random tokens and targets, and fp32 features; the same on every machine."""
    samples, num_text_padding, num_visual_padding = PACKS[name]
    pack = pack_of(samples, NUM_TOKENS, num_text_padding, num_visual_padding)
    generator = torch.Generator().manual_seed(1)
    num_text = len(pack.positions_T)
    tokens, targets = torch.randint(MODEL.vocab_size, (2, num_text), generator=generator)
    targets[torch.rand(num_text, generator=generator) < 0.4] = IGNORE_INDEX
    features = torch.randn(len(pack.visual_positions_I), MODEL.vision.hidden_size, generator=generator)
    return replace(pack, token_ids_T=tokens, targets_T=targets), features


def build_model(compute: ComputeConfig, phase: Phase, device: torch.device) -> SaisaModel:
    """Returns a whole model that trains what a phase trains, with random weights, the same on every machine."""
    shared = phase == "pretrain"
    config = build_transformer_config(MODEL, compute, ParallelConfig(), shared)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = SaisaModel(MODEL, config, groups, Stage(0, 1, range(MODEL.num_layers)), shared, compute.attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            random = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(random if parameter.dim() > 1 else 1 + random)
    freeze(model, phase)
    return model.to(device)


def step(compute: ComputeConfig, phase: Phase, device: torch.device, pack: str = "images") -> dict[str, Tensor]:
    """Returns the losses of a pack and the gradient of every parameter that the phase trains, in fp32 on the CPU."""
    model = build_model(compute, phase, device)
    inputs, features_IC = random_inputs(pack)
    # FP8 in its third pass: delayed scaling knows no sizes before it has seen them, forward and backward.
    for _ in range(3 if compute.precision == "fp8" else 1):
        model.zero_grad()
        model.set_is_first_microbatch()  # as megatron-core's schedule does; FP8 weights are made anew
        losses = model(inputs.to(device), features_IC.to(device, compute_dtype(compute)))
        losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient: {missing}"
    found = {"losses": losses.detach(), **{name: g for name, g in gradients.items() if g is not None}}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far each tensor is from what it should be, relative in the Euclidean norm (0 if both are 0)."""
    assert found.keys() == exact.keys()
    tiny = torch.finfo(torch.float32).tiny
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm().clamp(min=tiny)) for name in exact}


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], losses: float, gradients: float) -> None:
    """Asserts that losses and gradients differ by at most these fractions, and that every number is finite."""
    far = {name: error for name, error in errors(found, exact).items() if not error <= gradients}
    assert not far, f"further off than {gradients}: {far}"
    error = errors(found, exact)["losses"]
    assert error <= losses, f"the losses are off by {error:.2e}, allowed {losses:.2e}"
