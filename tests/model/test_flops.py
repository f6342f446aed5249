"""Parameters, FLOPs and activation memory against what torch counts on the reference and on the Megatron-core model."""

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, SiglipVisionConfig

import model.attention
from model.compute import build_transformer_config
from model.config import ComputeConfig, ModelConfig, VisionConfig
from model.flops import (
    Phase,
    activation_bytes,
    encoder_forward_flops,
    forward_flops,
    parameter_counts,
    training_flops,
)
from model.hf.vision_saisa import VisionTower
from model.pack import IGNORE_INDEX, Pack
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from pipeline.optimizer import freeze
from tests.model.reference import reference_logits
from tests.model.test_saisa import LAYOUTS, V, random_pack, random_weights, tiny
from tests.model.varlen import varlen_reference

PHASES = ["pretrain", "finetune"]
SIZES = [{}, {"num_query_groups": 1}, {"projector": "linear"}, {"qkv_bias": True}, {"tie_embeddings": True}]


def model_of_stage(config: ModelConfig, phase: Phase, recompute: str = "none") -> SaisaModel:
    """The model with random weights, frozen as the phase wants."""
    compute = ComputeConfig.model_validate({"precision": "fp32", "recompute": recompute})
    transformer = build_transformer_config(config, compute, ParallelConfig(), phase == "pretrain")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    whole = Stage(0, 1, range(config.num_layers))
    saisa = SaisaModel(config, transformer, groups, whole, phase == "pretrain")
    generator = torch.Generator().manual_seed(0)
    for parameter in saisa.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    freeze(saisa, phase)
    return saisa


def counted(work) -> int:
    # The plain composition of products: torch's counter knows nothing of the fused kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def sample_sizes(pack: Pack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    targets = [int((part != IGNORE_INDEX).sum()) for part in pack.targets_T.split(pack.text_lengths)]
    return np.array(pack.text_lengths), np.array(pack.visual_lengths), np.array(targets)


def test_forward_flops_equal_those_of_the_reference():
    for changes in ({}, {"projector": "linear"}):
        config = tiny(num_query_groups=4, vocab_size=128, **changes)
        pack, features = random_pack(config, [(2, 5)])
        weights = random_weights(config)
        arguments = (pack.token_ids_T, pack.positions_T, features, pack.visual_positions_I)
        with torch.no_grad():
            found = counted(lambda w=weights, c=config, a=arguments: reference_logits(w, c, *a))
        assert forward_flops(config, num_text=7, num_visual=V) == found


@pytest.mark.parametrize("changes", SIZES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_training_flops_equal_those_of_the_model(phase, changes, megatron):
    config = tiny(**changes)
    saisa = model_of_stage(config, phase)
    pack, features = random_pack(config, LAYOUTS)
    text, visual, targets = sample_sizes(pack)
    assert targets.sum() < text.sum()

    with torch.no_grad():
        assert forward_flops(config, text, visual, targets, phase).sum() == counted(lambda: saisa(pack, features))
    found = counted(lambda: saisa(pack, features).sum().backward())
    # Megatron-core's own linear layers make the gradient of the frozen features too, which nobody asked for.
    projector_in = 2 * visual.sum() * config.vision.hidden_size * config.hidden_size
    unused = projector_in * (1 if phase == "pretrain" else config.num_layers)
    assert training_flops(config, phase, text, visual, targets).sum() + unused == found


@pytest.mark.parametrize("changes", SIZES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_parameter_counts_equal_those_of_the_model(phase, changes, megatron):
    saisa = model_of_stage(tiny(**changes), phase)
    sizes = {name: parameter.numel() for name, parameter in saisa.named_parameters()}
    counts = parameter_counts(tiny(**changes), phase)
    assert counts.total == sum(sizes.values())
    assert counts.num_trained == sum(p.numel() for p in saisa.parameters() if p.requires_grad)
    assert counts.projectors == sum(size for name, size in sizes.items() if "projector" in name)
    assert counts.embedding + counts.head == sum(
        size for name, size in sizes.items() if name.startswith(("embedding.", "output."))
    )


def test_parameters_of_vicuna_7b():
    vision = VisionConfig(hidden_size=1024, num_layers=24, image_size=336, patch_size=14)
    vicuna = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        head_dim=128,
        vocab_size=32000,
        max_positions=4096,
        vision=vision,
    )
    counts = parameter_counts(vicuna, "finetune")
    assert counts.total - counts.projectors == 6_738_415_616  # what Hugging Face reports for Llama-2-7B
    assert counts.projectors == 32 * parameter_counts(vicuna, "pretrain").num_trained == 32 * 20_979_712


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_encoder_flops_equal_the_counted_ones(kind, select_layer):
    config = (CLIPVisionConfig if kind == "clip" else SiglipVisionConfig)(
        hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    tower = VisionTower(config, select_layer)
    found = counted(lambda: tower(torch.zeros(1, 3, 32, 32)))
    vision = VisionConfig(
        type=kind, hidden_size=16, num_layers=3, image_size=32, patch_size=8, select_layer=select_layer
    )
    assert encoder_forward_flops(vision, 40) == found


class FlashLike(torch.autograd.Function):
    """Attention that keeps what a flash kernel keeps: its three inputs, its output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Any) -> Tensor:
        ctx.segments = segments
        out = varlen_reference(q, k, v, segments).contiguous()
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], q.shape[0]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v = inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            out = varlen_reference(q, k, v, ctx.segments)
        return *torch.autograd.grad(out, inputs, gradients), None


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what a fused kernel keeps: its input and the scale of each row. Its gradient is a stand-in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        return gradients[0] * scale * weight, (gradients[0] * x * scale).sum(0)


def flash_like(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    k, v = (x.index_select(0, pack.segments.key_indices) for x in (k, v))
    return FlashLike.apply(q, k, v, pack.segments)


def saved_bytes(saisa: SaisaModel, pack: Pack, features: Tensor) -> tuple[int, int]:
    """Bytes of what a forward pass saves besides parameters: of floating-point numbers, and of everything else."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in saisa.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        saisa(pack, features)
    sizes = [(tensor.untyped_storage().nbytes(), tensor.is_floating_point()) for tensor in saved.values()]
    return sum(n for n, is_float in sizes if is_float), sum(n for n, is_float in sizes if not is_float)


@pytest.mark.parametrize("changes", [{}, {"num_query_groups": 1}, {"projector": "linear"}], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("phase", PHASES)
def test_activation_bytes_equal_what_autograd_saves(phase, recompute, changes, megatron, monkeypatch):
    monkeypatch.setattr(model.attention, "dense_attention", flash_like)
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight))
    config = tiny(hidden_size=64, ffn_hidden_size=96, head_dim=16, **changes)
    pack, features = random_pack(config, LAYOUTS * 4)
    sizes = (len(pack.positions_T), len(features), pack.num_targets, len(pack.segments.key_indices))
    floats, others = saved_bytes(model_of_stage(config, phase, recompute), pack, features)

    expected = activation_bytes(config, phase, recompute, *sizes, element_bytes=4)
    kept = expected.total(config.num_layers) - expected.recomputed
    if recompute != "none":  # the tables are held by the checkpoint itself, not by autograd
        kept -= 2 * len(pack.key_positions_S) * config.head_dim * 4
    elif phase == "pretrain":  # nothing before the first layer is trained, so its input norm keeps nothing
        kept -= sizes[0] * (config.hidden_size * 4 + 4)
    assert floats == kept
    assert others < 0.02 * floats, "row numbers and masks, which the formula leaves out"
