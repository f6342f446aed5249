"""The other architectures of the family in whole runs: both stages, divided, resumed, exported."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from model.hf_read import load_config as load_hf_config
from model.import_hf import convert_release
from model.weights import read_safetensors
from pipeline.checkpoint.checkpoint import restore_checkpoint
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import RunConfig
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.export_hf import export
from pipeline.loop import train
from pipeline.state import build
from pipeline.step import train_step
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
    "open_flamingo": {
        "model__architecture": "flamingo",
        "model__cross_attention": "open_flamingo",
        "model__cross_attention_every": 2,
        "model__resampler_tokens": 9,
    },
    "llama_3_2": {
        "model__architecture": "flamingo",
        "model__cross_attention": "llama_3_2",
        "model__cross_attention_every": 3,
    },
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
    ("blocks", "pretrain", "TP2 PP2"),
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
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("llava", "blocks", "llama_3_2"))) for name in FAMILY],
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


def test_a_llava_leaves_for_transformers_own_class(runs, tmp_path):
    found = find_checkpoint(runs("llava")["finetune"].run_dir)
    for form in ("saisa", "llava-hf"):
        export(found, tmp_path / form, form)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "saisa", trust_remote_code=True).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava-hf").eval()
    image, num_tokens = theirs.config.image_token_id, ours.config.num_image_tokens
    ids = torch.tensor([[5, 6, *[image] * num_tokens, 7, 8, *[image] * num_tokens, 9]])
    side = theirs.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    text = ids[0] != image
    with torch.no_grad():
        found, expected = (model(ids, pixel_values=pixels).logits[0, text, :image] for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("form", ["llava-hf", "llava"])
def test_other_architectures_do_not_leave_as_llava(runs, tmp_path, form):
    found = find_checkpoint(runs("blocks")["finetune"].run_dir)
    with pytest.raises(
        ValueError, match=f"FORMAT={form} cannot hold model.architecture='saisa'; export with FORMAT=saisa"
    ):
        export(found, tmp_path / "out", form)


@pytest.mark.slow
def test_a_llava_that_comes_in_trains_on_as_itself_and_as_shortv(runs, deep_world, tmp_path):
    """Out in LLaVA's own layout and in again: the first loss in stage 2 is that of the checkpoint."""
    second = runs("llava")["finetune"]
    export(find_checkpoint(second.run_dir), tmp_path / "out", "llava")
    convert_release(tmp_path / "out", None, tmp_path / "base")
    state = build(second, initialize_distributed())
    restore_checkpoint(find_checkpoint(second.run_dir), state.run, state.stages, state.optimizer, state.groups)
    expected = train_step(state, state.source[0], 0.0).loss
    shutdown_distributed()
    losses = {}
    for name in ("llava", "shortv"):
        started = {"init__base": tmp_path / "base", "init__projector": "base", "train__max_steps": 1}
        config = deep_world.config("demo-stage2", tmp_path / name, **FAMILY[name] | started)
        train(config)
        losses[name] = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["llava"] == pytest.approx(expected, rel=1e-6) and losses["shortv"] != losses["llava"]


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
