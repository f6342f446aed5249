"""What the layers are made of and told, as far as a machine without a GPU shows it."""

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.process_groups_config import ProcessGroupCollection
from pydantic import ValidationError

from model import backend
from model.backend import check_fp8, check_machine
from model.compute import build_transformer_config
from model.config import ComputeConfig
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from tests.gpu.steps import BF16_BOUNDS, MODEL, assert_close, random_inputs, step

CPU = torch.device("cpu")


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
@pytest.mark.parametrize("pack", ["images", "text only", "no visual rows"])
def test_bf16_is_near_fp32(pack, phase, megatron):
    """The comparison of the GPU tests, with the bounds they use."""
    exact = step(ComputeConfig(precision="fp32"), phase, CPU, pack)
    assert_close(step(ComputeConfig(precision="bf16"), phase, CPU, pack), exact, **BF16_BOUNDS)


def test_those_bounds_see_a_wrong_gradient(megatron):
    exact = step(ComputeConfig(precision="fp32"), "finetune", CPU)
    name = "layers.0.attention.linear_kv.weight"
    with pytest.raises(AssertionError, match=f"further off than 0.06.*{name}"):
        assert_close(exact | {name: exact[name] * 1.1}, exact, **BF16_BOUNDS)
    with pytest.raises(AssertionError, match="nan"):
        assert_close(exact | {name: exact[name] * float("nan")}, exact, **BF16_BOUNDS)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_computing_again_changes_nothing(recompute, megatron):
    exact = step(ComputeConfig(precision="fp32"), "finetune", CPU)
    found = step(ComputeConfig(precision="fp32", recompute=recompute), "finetune", CPU)
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_what_a_stage_hands_on_is_no_view(megatron):
    """On a GPU megatron-core frees it after sending, and asserts that it is not a view."""
    config = build_transformer_config(MODEL, ComputeConfig(precision="fp32"), ParallelConfig(), False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    first = SaisaModel(MODEL, config, groups, Stage(0, 2, range(1)), False)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(0.01)
    states_T1D = first(*random_inputs("images"))
    assert states_T1D.shape == (320, 1, 512) and states_T1D._base is None and states_T1D.grad_fn is not None


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_fp8_numbers_of_a_recipe(recipe, expected):
    compute = ComputeConfig(precision="fp8", fp8_recipe=recipe)
    config = build_transformer_config(MODEL, compute, ParallelConfig(), False)
    assert (config.fp8, config.fp8_recipe) == (expected, recipe)
    # Ranks of other replicas have other numbers of micro-batches: whoever waits for them at each waits for ever.
    assert config.tp_only_amax_red
    assert config.params_dtype == torch.bfloat16
    assert build_transformer_config(MODEL, ComputeConfig(), ParallelConfig(), False).fp8 is None


def test_edge_layers_are_counted_over_the_whole_model():
    model = MODEL.model_copy(update={"num_layers": 8})
    compute = ComputeConfig(precision="fp8", bf16_edge_layers=2)
    config = build_transformer_config(model, compute, ParallelConfig(), False)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(8)] == [True] * 2 + [False] * 4 + [True] * 2


def test_delayed_scaling_refuses_edge_layers():
    with pytest.raises(ValidationError, match="compute.bf16_edge_layers=1 .* compute.fp8_recipe=delayed"):
        ComputeConfig(precision="fp8", fp8_recipe="delayed", bf16_edge_layers=1)


@pytest.mark.parametrize(("precision", "recipe"), [("bf16", "tensorwise"), ("fp8", "delayed"), ("fp8", "mxfp8")])
def test_weights_in_8_bits_alone_need_scales_that_follow_from_the_weights(precision, recipe):
    message = f"compute.fp8_weights=true with compute.precision={precision} .*{recipe}.* use tensorwise or blockwise"
    with pytest.raises(ValidationError, match=message):
        ComputeConfig(precision=precision, fp8_recipe=recipe, fp8_weights=True)
    compute = ComputeConfig(precision="fp8", fp8_recipe="blockwise", fp8_weights=True)
    assert build_transformer_config(MODEL, compute, ParallelConfig(), False).fp8_param


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_delayed_scaling_refuses_recomputing(recompute):
    with pytest.raises(ValidationError, match=f"compute.recompute={recompute} with compute.fp8_recipe=delayed"):
        ComputeConfig(precision="fp8", fp8_recipe="delayed", recompute=recompute)
    ComputeConfig(precision="bf16", fp8_recipe="delayed", recompute=recompute)


def test_rows_that_a_kernel_wants():
    assert ComputeConfig().kernel_rows(are_divided=True) == 1
    assert ComputeConfig(precision="fp8").kernel_rows(are_divided=True) == 32
    blockwise = ComputeConfig(precision="fp8", fp8_recipe="blockwise")
    assert [blockwise.kernel_rows(are_divided) for are_divided in (False, True)] == [32, 128]


def test_transformer_engine_without_a_gpu_is_refused(monkeypatch):
    check_machine()
    monkeypatch.setattr(backend, "HAVE_TE", True)
    with pytest.raises(ValueError, match="Transformer Engine is installed, .* and there is no GPU"):
        check_machine()


def test_fp8_refuses_a_machine_without_a_gpu():
    with pytest.raises(ValueError, match="compute.precision=fp8 with compute.fp8_recipe=tensorwise needs a GPU"):
        check_fp8("tensorwise")


def test_fused_gradients_refuse_layers_that_cannot(megatron):
    compute = ComputeConfig(precision="bf16", gradient_accumulation_fusion=True)
    with pytest.raises(ValueError, match="compute.gradient_accumulation_fusion=true needs Transformer Engine"):
        step(compute, "finetune", CPU)
