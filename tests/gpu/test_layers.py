"""Transformer Engine's layers, FP8 and the flash kernels inside the whole model, forward and every gradient."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._dynamo.utils import counters

from model.attention import installed_kernels
from model.backend import quick_gelu
from model.compute import build_transformer_config
from model.config import ComputeConfig, ModelConfig
from model.flops import parameter_counts
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from tests.gpu.needs import need_recipe, need_transformer_engine
from tests.gpu.steps import BF16_BOUNDS, FP8_BOUNDS, assert_close, build_model, step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron")]

PHASES = ["pretrain", "finetune"]
RECIPES = ["tensorwise", "blockwise", "delayed", "mxfp8"]
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
ON_CPU = """
import sys, torch
from model.config import ComputeConfig
from pipeline.distributed import initialize_distributed
from tests.gpu.steps import step
device = initialize_distributed()
assert device.type == "cpu"
torch.save(step(ComputeConfig(precision="fp32", attention="dense"), "finetune", device), sys.argv[1])
"""


def test_fp32_is_that_of_the_cpu(gpu, tmp_path):
    """In fp32 the layers are megatron-core's own, since Transformer Engine would round to TF32."""
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ON_CPU, tmp_path / "step.pt"], env=without_gpu, check=True)
    exact = torch.load(tmp_path / "step.pt")
    found = step(ComputeConfig(precision="fp32", attention="dense"), "finetune", gpu)
    assert_close(found, exact, losses=1e-5, gradients=1e-4)


def test_the_encoders_fused_activation_is_torchs(gpu):
    need_transformer_engine()
    x = torch.randn(64, 256, device=gpu).bfloat16()
    exact = x.float() * torch.sigmoid(1.702 * x.float())
    with torch.no_grad():
        assert (quick_gelu()(x).float() - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("pack", ["images", "text only", "no visual rows"])
@pytest.mark.parametrize("attention", ["dense", "torch_varlen", "flash_attn", "block"])
def test_bf16_is_near_fp32(attention, pack, phase, gpu):
    need_transformer_engine()
    if attention not in installed_kernels():
        pytest.skip(f"needs {attention}: the package is not installed")
    exact = step(ComputeConfig(precision="fp32", attention="dense"), phase, gpu, pack)
    found = step(ComputeConfig(precision="bf16", attention=attention), phase, gpu, pack)
    assert_close(found, exact, **BF16_BOUNDS)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("pack", ["images", "text only"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(recipe, pack, phase, gpu):
    need_recipe(recipe)
    exact = step(ComputeConfig(precision="bf16"), phase, gpu, pack)
    found = step(ComputeConfig(precision="fp8", fp8_recipe=recipe), phase, gpu, pack)
    assert_close(found, exact, **FP8_BOUNDS)
    assert not torch.equal(found["losses"], exact["losses"]), "nothing was multiplied in 8 bits"


def test_edge_layers_stay_bf16(gpu):
    """With both of two layers at an edge, FP8 computes nothing."""
    need_recipe("tensorwise")
    exact = step(ComputeConfig(precision="bf16", attention="dense"), "finetune", gpu)
    found = step(ComputeConfig(precision="fp8", bf16_edge_layers=1, attention="dense"), "finetune", gpu)
    assert_close(found, exact, losses=1e-3, gradients=1e-2)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "tensorwise", "blockwise"])
def test_computing_again_changes_nothing(precision, recompute, phase, gpu):
    if precision == "bf16":
        need_transformer_engine()
        compute = ComputeConfig(precision="bf16", attention="dense")
    else:
        need_recipe(precision)
        compute = ComputeConfig(precision="fp8", fp8_recipe=precision, attention="dense")
    exact = step(compute, phase, gpu)
    found = step(compute.model_copy(update={"recompute": recompute}), phase, gpu)
    # The same kernels on the same numbers, but for sums whose order a GPU does not fix, once rounded to bf16.
    assert_close(found, exact, losses=1e-6, gradients=2e-2)


def test_linear_layers_are_transformer_engines(gpu):
    need_transformer_engine()
    model = build_model(ComputeConfig(precision="bf16"), "finetune", gpu)
    classes = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in model.named_modules()}
    column, row = "TEColumnParallelLinear", "TERowParallelLinear"
    expected = {"fc1": column, "fc2": column, "linear_q": column, "linear_kv": column, "linear_proj": row}
    expected |= {"linear_fc1": column, "linear_fc2": row, "output": "ColumnParallelLinear"}
    assert {name: classes[name] for name in expected} == expected
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_nothing_is_compiled(precision, gpu):
    """Images and text as in LLaVA's data take a flash kernel, and no step waits for a compiler."""
    need_recipe("tensorwise")
    counters.clear()
    step(ComputeConfig(precision=precision), "finetune", gpu)
    assert not counters["frames"], dict(counters["frames"])


@pytest.mark.parametrize("phase", PHASES)
def test_7b_is_built_without_memory(phase, gpu):
    need_transformer_engine()
    sizes = ModelConfig.model_validate(yaml.safe_load((MODELS / "saisa-vicuna-7b.yaml").read_text()))
    shared = phase == "pretrain"
    config = build_transformer_config(sizes, ComputeConfig(precision="bf16"), ParallelConfig(), shared)
    config = replace(config, init_model_with_meta_device=True)  # Transformer Engine's way to say so
    groups = ProcessGroupCollection.use_mpu_process_groups()
    before = torch.cuda.memory_allocated()
    with torch.device("meta"):
        model = SaisaModel(sizes, config, groups, Stage(0, 1, range(sizes.num_layers)), shared)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_counts(sizes, phase).total
    assert {parameter.device.type for parameter in model.layers.parameters()} == {"meta"}
    # Megatron-core's own classes know no meta device on a GPU: the embedding and the head are there.
    vocabulary_bytes = 2 * 2 * sizes.vocab_size * sizes.hidden_size
    assert torch.cuda.memory_allocated() - before <= vocabulary_bytes + 2**20
