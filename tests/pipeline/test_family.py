"""The other architectures of the family in whole runs: both stages, divided, resumed, exported."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model.hf_read import load_config as load_hf_config
from model.weights import read_safetensors
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import RunConfig
from pipeline.export_hf import export
from pipeline.loop import train
from tests.pipeline.test_export import assert_logits_are_those_of
from tests.pipeline.test_parallel import SPLITS, assert_same_run, divided
from tests.processes import run_together
from tests.world import DEEP_STEPS, World

PHASES = ("pretrain", "finetune")
FAMILY: dict[str, dict[str, Any]] = {
    "llava": {"model__architecture": "llava"},
    "naavit": {"model__architecture": "naavit"},
    "shortv": {"model__architecture": "shortv", "model__frozen_layers": "[0,2]"},
    "blocks": {"model__block_size": 3},
    "own in stage 1": {"model__pretrain_projectors": "own"},
    "resampler": {"model__projector": "resampler", "model__resampler_tokens": 9},
}


def stages(world: World, root: Path, name: str) -> tuple[RunConfig, RunConfig]:
    settings = FAMILY[name] | {"train__max_steps": DEEP_STEPS}
    first = world.config("demo-stage1", root / "stage1", **settings)
    train(first)
    second = world.config("demo-stage2", root / "stage2", **settings, init__projector=first.run_dir)
    train(second)
    return first, second


CASES = [(name, phase, split) for name in FAMILY for phase in PHASES for split in ("PP2 interleaved", "TP2 PP2")]
# What passes between stages, what trains where nothing else does, and rows of both kinds in parts; the rest in soak
OFTEN = [
    ("llava", "pretrain", "PP2 interleaved"),
    ("llava", "finetune", "TP2 PP2"),
    ("blocks", "finetune", "PP2 interleaved"),
    ("resampler", "pretrain", "TP2 PP2"),
    ("blocks", "pretrain", "TP2 PP2"),
    ("own in stage 1", "pretrain", "PP2 interleaved"),
]


@pytest.fixture(scope="module")
def runs(deep_world, tmp_path_factory) -> Callable[[str], dict[str, RunConfig]]:
    """Finished runs of both stages in one process."""

    @cache
    def trained(name: str) -> dict[str, RunConfig]:
        return dict(zip(PHASES, stages(deep_world, tmp_path_factory.mktemp(name), name), strict=True))

    return trained


@pytest.mark.parametrize(
    ("name", "phase", "split"),
    [pytest.param(*case, id=" ".join(case), marks=[pytest.mark.slow] * (case not in OFTEN)) for case in CASES],
)
def test_a_divided_run_is_the_run_of_one_process(runs, name, phase, split, tmp_path):
    whole = runs(name)[phase]
    num_processes, parallel = SPLITS[split]
    config = divided(whole, tmp_path, **parallel)
    run_together(num_processes, train, config)
    assert_same_run(config, whole)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("naavit", "shortv"))) for name in FAMILY]
)
def test_an_export_says_the_same(runs, name, tmp_path):
    second = runs(name)["finetune"]
    export(find_checkpoint(second.run_dir), tmp_path / "out")
    config = load_hf_config(tmp_path / "out")
    assert (config.architecture, config.block_size) == (second.model.architecture, second.model.block_size)
    assert_logits_are_those_of(second, tmp_path / "out")


def test_stage_1_trains_and_exports_a_projector_for_each_layer(runs, tmp_path):
    first = runs("own in stage 1")["pretrain"]
    export(find_checkpoint(first.run_dir), tmp_path / "out")
    assert_logits_are_those_of(first, tmp_path / "out")
    trained = dict(read_safetensors(tmp_path / "out", lambda name: name.endswith("mm_projector.2.bias")))
    base = dict(read_safetensors(first.init.base, lambda name: True))
    assert len(trained) == first.model.num_layers and not trained.keys() & base.keys()
    assert len({tuple(tensor.tolist()) for tensor in trained.values()}) == first.model.num_layers


def test_stage_2_refuses_a_projector_of_another_architecture(runs, deep_world, tmp_path):
    first = runs("llava")["pretrain"]
    config = deep_world.config("demo-stage2", tmp_path, init__projector=first.run_dir)
    with pytest.raises(ValueError, match=r"is of another model: model.architecture was 'llava', is 'saisa'; run stage"):
        train(config)


def test_a_run_of_another_architecture_does_not_go_on(runs, deep_world):
    second = runs("llava")["finetune"]
    settings = {"model__architecture": "naavit", "train__max_steps": DEEP_STEPS + 1}
    config = deep_world.config("demo-stage2", second.run_dir, **settings, init__projector=second.init.projector)
    with pytest.raises(ValueError, match="model.architecture was 'llava', is 'naavit'"):
        train(config)
