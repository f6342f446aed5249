"""Every way to divide the model gives the losses, the gradients and the weights of one process, and resumes the others.

The rows of these runs have no, one or two images, and the ranks different numbers of micro-batches.
"""

import shutil

import pytest
import torch
from megatron.core import dist_checkpointing
from rich.console import Console

from model.parallel import ParallelConfig
from pipeline.checkpoint.checkpoint import load_trained_parameters, restore_checkpoint, sharded_state
from pipeline.checkpoint.run_info import find_checkpoint, latest_checkpoint
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config import RunConfig
from pipeline.data.batches import RankCoordinates, build_source, load_table, open_shards
from pipeline.distributed import check_world_size, initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from pipeline.state import build
from pipeline.step import model_inputs
from tests.processes import run_together
from tests.world import DEEP_STEPS

# Gradients of a few weights each; megatron-core's buckets hold all of so small a model.
BUCKETS = {"bucket_parameters": 2000}
ONE_BUCKET = {"overlap_grad_reduce": False, "overlap_param_gather": False}
# fp32 sums in another order, which steps of Adam amplify; no split has been seen to differ by more.
TOLERANCE = 1e-4
SPLITS = {
    "TP2": (2, {"tp": 2}),
    "TP2 sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "PP2 interleaved": (2, {"pp": 2, "chunks_per_rank": 2, **BUCKETS}),
    "PP2 uneven": (2, {"pp": 2, "layers_per_stage": (3, 1)}),
    "DP2": (2, BUCKETS),
    "DP2 without overlap": (2, ONE_BUCKET),
    "TP2 PP2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "TP2 DP2": (4, {"tp": 2}),
    "PP2 DP2": (4, {"pp": 2, **BUCKETS}),
}


# bf16 rounds the partial sums of each tensor-parallel process to 8 bits. Worst seen: 7e-5 of a loss, 4e-3 of a norm.
BF16_LOSS, BF16_NORM = 5e-4, 2e-2


def divided(config: RunConfig, run_dir, **parallel) -> RunConfig:
    values = config.model_dump() | {"run_dir": run_dir}
    return RunConfig.model_validate(values | {"parallel": parallel})


def trained_parameters(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    initialize_distributed()
    stored = load_trained_parameters(checkpoint)
    shutdown_distributed()
    return stored


def assert_same_run(ours: RunConfig, theirs: RunConfig) -> None:
    for one, other in zip(read_metrics(ours.run_dir), read_metrics(theirs.run_dir), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
    mine, expected = trained_parameters(ours), trained_parameters(theirs)
    assert mine.keys() == expected.keys()
    for name, tensor in mine.items():
        assert (tensor - expected[name]).abs().max() <= TOLERANCE * expected[name].abs().max(), name


RESUMED = ["TP2 PP2", "DP2"]  # whose stage 2 another test compares, with what comes of its checkpoints
CASES = [(phase, split) for phase in ("pretrain", "finetune") for split in SPLITS]
CASES = [case for case in CASES if case not in [("finetune", split) for split in RESUMED]]
# Four processes for what each two do alone in stage 1, and together in stage 2
SLOW = [("pretrain", "TP2 DP2"), ("pretrain", "PP2 DP2")]
CASES = [pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]


@pytest.mark.parametrize(("phase", "split"), CASES)
def test_a_divided_run_is_the_run_of_one_process(deep_stage1, deep_stage2, phase, split, tmp_path):
    num_processes, parallel = SPLITS[split]
    whole = deep_stage1 if phase == "pretrain" else deep_stage2
    config = divided(whole, tmp_path, **parallel)
    run_together(num_processes, train, config)
    assert_same_run(config, whole)


@pytest.mark.parametrize(
    "split", ["TP2 sequence", "PP2 interleaved", "TP2 PP2", "DP2"], ids=lambda split: f"one to {split}"
)
def test_a_run_goes_on_when_it_is_divided_otherwise(deep_stage2, split, tmp_path):
    num_processes, parallel = SPLITS[split]
    config = divided(deep_stage2, tmp_path, **parallel)
    keep_until_step(deep_stage2, DEEP_STEPS // 2, tmp_path)
    run_together(num_processes, train, config)
    assert_same_run(config, deep_stage2)


@pytest.mark.parametrize("split", RESUMED)
def test_a_divided_run_goes_on_bit_for_bit_and_in_one_process(deep_stage2, split, tmp_path):
    """It is the run of one process, and so is what goes on from the middle of it, divided the same way or not at all.

    The first writes its checkpoints in the background, the second does not.
    """
    num_processes, parallel = SPLITS[split]
    first, second = (divided(deep_stage2, tmp_path / name, **parallel) for name in ("first", "second"))
    settings = first.checkpoint.model_copy(update={"in_background": True})
    first = first.model_copy(update={"checkpoint": settings})
    run_together(num_processes, train, first)
    assert_same_run(first, deep_stage2)
    whole = divided(deep_stage2, tmp_path / "whole")
    keep_until_step(first, DEEP_STEPS // 2, whole.run_dir)
    train(whole)
    assert_same_run(whole, deep_stage2)
    keep_until_step(first, DEEP_STEPS // 2, second.run_dir)
    run_together(num_processes, train, second)
    one, other = (read_metrics(config.run_dir) for config in (first, second))
    assert [(step["loss"], step["grad_norm"]) for step in one] == [(step["loss"], step["grad_norm"]) for step in other]


@pytest.fixture(scope="module")
def bf16_stage2(deep_world, deep_stage1, tmp_path_factory) -> RunConfig:
    """A finished stage 2 in bf16: its optimizer keeps weights in fp32 beside the model's."""
    changes = {"compute__precision": "bf16", "init__projector": deep_stage1.run_dir}
    changes |= {"train__max_steps": DEEP_STEPS}
    config = deep_world.config("demo-stage2", tmp_path_factory.mktemp("bf16"), **changes)
    train(config)
    return config


@pytest.mark.parametrize(
    ("split", "changes"), [("TP2 PP2", {}), ("PP2 interleaved", {}), ("DP2", {"reduce_in_bf16": True})], ids=str
)
def test_a_divided_run_in_bf16_is_near_that_of_one_process(bf16_stage2, split, changes, tmp_path):
    num_processes, parallel = SPLITS[split]
    config = divided(bf16_stage2, tmp_path, **parallel, **changes)
    run_together(num_processes, train, config)
    for one, other in zip(read_metrics(tmp_path), read_metrics(bf16_stage2.run_dir), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=BF16_LOSS)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=BF16_NORM)


def test_weights_and_moments_pass_from_split_to_split_unchanged(bf16_stage2, tmp_path):
    before = bf16_stage2.run_dir
    expected = all_tensors(bf16_stage2.run_dir)
    moments = [name for name in expected if "exp_avg" in name]
    assert len(moments) == 2 * len(trained_parameters(bf16_stage2)) and all(expected[name].any() for name in moments)
    for split in ("TP2 PP2", "DP2", "PP2 interleaved", "TP2 DP2"):
        num_processes, parallel = SPLITS[split]
        after = tmp_path / split.replace(" ", "-")
        run_together(num_processes, save_again, divided(bf16_stage2, after, **parallel), before)
        found = all_tensors(after)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        before = after


def save_again(config: RunConfig, run_dir) -> None:
    """Takes up the last checkpoint of a run folder, divided as configured, and saves it in that of `config`."""
    state = build(config, initialize_distributed(config.parallel))
    step = restore_checkpoint(find_checkpoint(run_dir), state.run, state.stages, state.optimizer, state.groups)
    with CheckpointWriter(config.run_dir, state.run, {"config": {}}, 1, False, lambda line: None) as writer:
        writer.save(step, sharded_state(state.stages, state.optimizer, state.groups))
    shutdown_distributed()


def all_tensors(run_dir) -> dict[str, torch.Tensor]:
    """Returns every tensor of the last checkpoint, those of the optimizer too."""
    initialize_distributed()
    stored = dist_checkpointing.load_plain_tensors(str(find_checkpoint(run_dir)))
    shutdown_distributed()
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}


def test_the_ranks_of_these_runs_have_different_numbers_of_micro_batches(deep_stage2):
    sets = open_shards(deep_stage2)
    table = load_table(deep_stage2, sets, Console(quiet=True))
    schedule = build_source(deep_stage2, sets, table, RankCoordinates(0, 2)).schedule
    counts = [[len(packs) for packs in schedule.plan(step).packs] for step in range(DEEP_STEPS)]
    assert any(one != other for one, other in counts)
    images = table.column("num_images")
    assert {0, 1, 2} == set(images[schedule.samples(0, 7 * DEEP_STEPS)])


@pytest.mark.parametrize("split", ["DP2", "PP2 DP2"])
def test_a_rank_without_samples_keeps_in_step(deep_world, deep_stage1, split, tmp_path):
    """Its projectors get gradients too, of zeros; the sum of a bucket that lacks one would never begin."""
    changes = {"init__projector": deep_stage1.run_dir, "train__global_batch_size": 1, "train__max_steps": 3}
    whole = deep_world.config("demo-stage2", tmp_path / "whole", **changes)
    train(whole)
    num_processes, parallel = SPLITS[split]
    config = divided(whole, tmp_path / "split", **parallel)
    run_together(num_processes, train, config)
    assert_same_run(config, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__row_multiple": 16},
        {"compute__recompute": "selective"},
        {"compute__recompute": "full"},
        {"train__image_batch_size": 1},
    ],
    ids=str,
)
def test_padding_and_recomputing_change_nothing(deep_world, deep_stage1, deep_stage2, changes, tmp_path):
    changes = {"init__projector": deep_stage1.run_dir, "train__max_steps": DEEP_STEPS, **changes}
    config = deep_world.config("demo-stage2", tmp_path, **changes)
    train(config)
    assert_same_run(config, deep_stage2)


def test_stage_2_begins_with_the_loss_of_stage_1s_model(deep_world, deep_stage1, deep_stage2):
    """The shared projector in every layer is n copies of it."""
    first = build(deep_stage1, initialize_distributed())
    restore_checkpoint(find_checkpoint(deep_stage1.run_dir), first.run, first.stages, first.optimizer, first.groups)
    second = build(deep_stage2, torch.device("cpu"))
    for pack, features in model_inputs(second, second.source[0]):
        with torch.no_grad():
            shared, copied = (state.stages[0](pack, features) for state in (first, second))
        assert torch.equal(shared, copied) and len(copied)
    shutdown_distributed()


def test_processes_that_do_not_fill_replicas_are_refused():
    with pytest.raises(ValueError, match="parallel.tp=2 times parallel.pp=2 must divide the number of processes, 6;"):
        check_world_size(ParallelConfig(tp=2, pp=2), 6)


def keep_until_step(config: RunConfig, step: int, run_dir) -> None:
    """Makes `run_dir` what a run leaves that ends after a step."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(config.run_dir / name, run_dir / name)
    shutil.copy(config.run_dir / "metrics.jsonl", run_dir)
