"""Whole training runs of both stages on one GPU: bf16 near fp32, FP8 near bf16, every way to spend memory, resuming."""

import shutil
from collections.abc import Callable
from functools import cache
from itertools import count, product
from pathlib import Path

import pytest

for name in ("pyarrow", "streaming", "tensorboard", "torchvision", "upath"):
    pytest.importorskip(name, reason=f"whole runs write and read shards, which needs {name}")

from data_prep.shapes import write_dataset
from model.config import WEIGHT_RECIPES
from pipeline.checkpoint.run_info import latest_checkpoint
from pipeline.config import load_config
from pipeline.loop import train
from pipeline.metrics import read_metrics
from tests.gpu.needs import need_recipe, need_transformer_engine
from tests.world import SIZES, World, build_world

pytestmark = pytest.mark.gpu

# Features that FP8 can multiply, heads that flash kernels take.
GPU_SIZES = SIZES | {
    "num_layers": 3,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "head_dim": 64,
    "vision.hidden_size": 128,
}
PHASES = ["pretrain", "finetune"]
RECIPES = {"pretrain": ("demo-stage1", 1e-2), "finetune": ("demo-stage2", 1e-3)}
# Relative, of the losses and gradient norms of six steps. Bf16 against fp32 on a CPU: 0.0015 and 0.014.
BF16_BOUNDS = {"loss": 0.01, "grad_norm": 0.05}
# Single steps are compared in `test_layers`; these say that the weights which FP8 sees follow the optimizer.
FP8_BOUNDS = {"loss": 0.03, "grad_norm": 0.25}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns a function that trains a phase, once for the same settings, and returns its folder."""
    root, number = tmp_path_factory.mktemp("gpu"), count()
    write_dataset(root / "data", num_train=60, num_test=8, seed=0, image_size=64)
    world: World = build_world(root, GPU_SIZES)

    @cache
    def run(phase: str, **changes: object) -> Path:
        recipe, rate = RECIPES[phase]
        # Every phase 2 begins with the same projector.
        start = {"init__projector": run("pretrain", compute__precision="fp32")} if phase == "finetune" else {}
        folder = root / "runs" / f"{next(number)}-{phase}"
        train(world.config(recipe, folder, optim__learning_rate=rate, **start, **changes))
        return folder

    return run


def assert_near(folder: Path, exact: Path, loss: float, grad_norm: float) -> None:
    """Asserts that each step's loss and gradient norm differ by at most these fractions."""
    ours, theirs = read_metrics(folder), read_metrics(exact)
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=loss), f"step {one['step']}"
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=grad_norm), f"step {one['step']}"
    fall = theirs[0]["loss"] - theirs[-1]["loss"]
    assert fall > 2 * loss * theirs[-1]["loss"], "too little was learned for the comparison to mean anything"


@pytest.mark.parametrize("phase", PHASES)
def test_bf16_trains_like_fp32(phase, run):
    need_transformer_engine()
    bf16, fp32 = (run(phase, compute__precision=precision) for precision in ("bf16", "fp32"))
    assert_near(bf16, fp32, **BF16_BOUNDS)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed", "mxfp8"])
def test_fp8_trains_like_bf16(recipe, phase, run):
    need_recipe(recipe)
    fp8 = run(phase, compute__precision="fp8", compute__fp8_recipe=recipe)
    assert_near(fp8, run(phase, compute__precision="bf16"), **FP8_BOUNDS)


@pytest.mark.parametrize("recipe", WEIGHT_RECIPES)
def test_weights_in_8_bits_alone_train_as_those_beside_bf16(recipe, run):
    """Both are the optimizer's weights, rounded to 16 bits and then to 8: the first loss has the same numbers in it."""
    need_recipe(recipe)
    settings = {"compute__precision": "fp8", "compute__fp8_recipe": recipe}
    alone, beside = run("finetune", **settings, compute__fp8_weights="true"), run("finetune", **settings)
    assert_near(alone, beside, loss=2e-3, grad_norm=0.02)
    first, other = (read_metrics(folder)[0]["loss"] for folder in (alone, beside))
    assert first == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "changes",
    [
        {"compute__recompute": "selective"},
        {"compute__recompute": "full"},
        {"compute__gradient_accumulation_fusion": "true"},
        {"data__row_multiple": 32},
    ],
    ids=str,
)
def test_memory_and_padding_change_nothing(changes, phase, run):
    """Several packs a step, so that gradients accumulate; frozen weights have none to accumulate."""
    need_transformer_engine()
    compute = {"compute__precision": "bf16", "data__max_images_per_pack": 3}
    assert_near(run(phase, **compute, **changes), run(phase, **compute), loss=2e-3, grad_norm=0.02)


RESUMED = [
    {"compute__precision": "bf16"},
    {"compute__precision": "bf16", "optim__moments": "bf16"},
    {"compute__precision": "fp8", "compute__fp8_recipe": "tensorwise"},
    {"compute__precision": "fp8", "compute__fp8_recipe": "delayed"},
]
WITH_WEIGHTS = {"compute__precision": "fp8", "compute__fp8_weights": "true"}


@pytest.mark.parametrize(("phase", "changes"), [*product(PHASES, RESUMED), ("finetune", WITH_WEIGHTS)], ids=str)
def test_a_run_goes_on_from_its_checkpoint(phase, changes, run, tmp_path):
    """The optimizer is Transformer Engine's here, with moments and step counts of its own; so are delayed scales."""
    need_recipe("tensorwise")
    keep = {"checkpoint__save_every_steps": 3, "checkpoint__keep_last": 9}
    whole = run(phase, **changes, **keep)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    last = latest_checkpoint(tmp_path)
    assert last is not None and last.name == "step-00000006"
    shutil.rmtree(last)
    train(load_config(whole / "config.yaml", [f"run_dir={tmp_path}"]))
    assert_near(tmp_path, whole, loss=2e-3, grad_norm=0.02)
    # A forward pass adds up in one order, so a scale that was not restored would show in the first loss.
    resumed, undisturbed = (read_metrics(folder)[3]["loss"] for folder in (tmp_path, whole))
    assert resumed == pytest.approx(undisturbed, rel=1e-6)
