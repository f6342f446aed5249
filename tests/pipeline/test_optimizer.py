"""The schedule, and what each stage trains."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from pipeline import optimizer
from pipeline.config import OptimConfig
from pipeline.optimizer import OwnedRange, freeze, learning_rate
from tests.model.test_saisa import build, tiny


def test_warm_up_then_cosine_to_zero():
    optim = OptimConfig(learning_rate=2.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[100] == pytest.approx(0)
    # Hugging Face's scheduler, which LLaVA uses
    hf = get_cosine_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], 2.0), 10, 100)
    for step in range(100):
        assert hf.get_last_lr()[0] == pytest.approx(rates[step]), step
        hf.optimizer.step()
        hf.step()


def test_each_stage_trains_exactly_its_parameters(megatron):
    stage1 = build(tiny(), shared_projector=True)
    projector = [f"shared_projector.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    freeze(stage1, "pretrain")
    assert {name for name, p in stage1.named_parameters() if p.requires_grad} == set(projector)
    stage2 = build(tiny())
    freeze(stage2, "finetune")
    assert all(parameter.requires_grad for parameter in stage2.parameters())


def test_the_weight_of_a_range_is_the_optimizers_where_the_model_has_it_in_8_bits(monkeypatch):
    """A checkpoint of either then holds the same: fp32 rounded to 16 bits."""
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16))
    exact = torch.tensor([2.001, 3.017])
    owned = OwnedRange(parameter, 1, 3, {"param": exact})
    assert owned.weight.tolist() == [2, 3] and owned.weight.dtype == torch.bfloat16
    monkeypatch.setattr(optimizer, "is_float8tensor", lambda tensor: tensor is parameter)
    assert owned.weight.tolist() == [2, 3.015625] and owned.weight.dtype == torch.bfloat16
