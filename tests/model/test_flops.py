"""Parameters and FLOPs against what torch counts on the reference and on the Megatron-core model."""

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, SiglipVisionConfig

from model.compute import build_transformer_config
from model.config import ComputeConfig, ModelConfig, VisionConfig
from model.flops import (
    Phase,
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
from tests.model.test_saisa import LAYOUTS, RESAMPLER, V, random_pack, random_weights, tiny

PHASES = ["pretrain", "finetune"]
SIZES = [{}, {"num_query_groups": 1}, {"projector": "linear"}, RESAMPLER, {"qkv_bias": True}, {"tie_embeddings": True}]
FAMILY = [
    {"architecture": "llava"},
    {"architecture": "naavit", "projector": "linear"},
    {"architecture": "shortv", "frozen_layers": (0,)},
    {"architecture": "shortv", "frozen_layers": (1, 2)},
    {"block_size": 2},
    {"block_size": 2} | RESAMPLER,
    {"pretrain_projectors": "own"},
    {"pretrain_projectors": "own", "block_size": 2},
    {"architecture": "flamingo", "cross_attention": "open_flamingo", "cross_attention_every": 2},
    {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": 3, "projector": "linear"},
    {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": 1} | RESAMPLER,
]


def model_of_stage(config: ModelConfig, phase: Phase, recompute: str = "none") -> SaisaModel:
    """The model with random weights, frozen as the phase wants."""
    compute = ComputeConfig.model_validate({"precision": "fp32", "recompute": recompute})
    shared = config.shares_projector(phase)
    transformer = build_transformer_config(config, compute, ParallelConfig(), shared)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    whole = Stage(0, 1, range(config.num_layers))
    saisa = SaisaModel(config, transformer, groups, whole, shared)
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


@pytest.mark.parametrize("changes", [*SIZES, *FAMILY], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_training_flops_equal_those_of_the_model(phase, changes, megatron):
    config = tiny(**changes)
    saisa = model_of_stage(config, phase)
    pack, features = random_pack(config, LAYOUTS)
    text, visual, targets = sample_sizes(pack)
    assert targets.sum() < text.sum()

    # A resampler's queries, the same for all images, are made once a pack and counted for each image.
    names = [name for name, _ in saisa.named_parameters()]
    queries = 2 * config.resampler_tokens * config.vision.hidden_size**2
    repeated = (pack.num_images - 1) * queries * sum(name.endswith("resampler.query.weight") for name in names)
    with torch.no_grad():
        found = counted(lambda: saisa(pack, features)) + repeated
        assert forward_flops(config, text, visual, targets, phase).sum() == found
    found = counted(lambda: saisa(pack, features).sum().backward()) + 3 * repeated
    # Megatron-core's own linear layers make the gradient of the frozen features too, which nobody asked for.
    projector_in = 2 * visual.sum() * config.vision.hidden_size * config.hidden_size
    first = ("projector.fc1.weight", "projector.linear.weight")
    unused = 0 if config.projector == "resampler" else projector_in * sum(name.endswith(first) for name in names)
    assert training_flops(config, phase, text, visual, targets).sum() + unused == found


@pytest.mark.parametrize("changes", [*SIZES, *FAMILY], ids=str)
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
    resampled = parameter_counts(vicuna.model_copy(update={"projector": "resampler"}), "finetune")
    one = 4 * 1024 * 1024 + 3 * 1024 + 256 * 1024 + 1024 * 4096 + 4096  # attention, latents, linear layer
    assert resampled.projectors == 32 * one == 277_053_440
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
