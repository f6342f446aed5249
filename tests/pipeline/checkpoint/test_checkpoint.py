"""How checkpoints are written: whole or not there, in the background too, with an error that says why."""

import os
import signal
import threading
import time
from dataclasses import asdict
from functools import wraps
from multiprocessing import active_children
from traceback import StackSummary
from typing import cast

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.checkpoint import writer as checkpoint_writer
from pipeline.checkpoint.checkpoint import load_trained_parameters, restore_checkpoint, sharded_state
from pipeline.checkpoint.run_info import describe_run, find_checkpoint, read_info
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.state import build
from tests.processes import run_together

FAILURE = "checkpoints: a checkpoint could not be written; the one before it is whole: "


@pytest.fixture
def run(stage2, megatron):
    """What a checkpoint belongs to, within a process group."""
    return describe_run(stage2, ["shards"], 6)


def state_of(num_tensors: int) -> dict:
    return {
        f"w{number}": ShardedTensor.from_rank_offsets(f"w{number}", torch.full((2,), float(number)))
        for number in range(num_tensors)
    }


def writer(folder, run, in_background: bool) -> CheckpointWriter:
    return CheckpointWriter(folder, run, {"config": {}}, 2, in_background, lambda line: None)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_has_all_its_tensors(run, tmp_path, in_background):
    """Of a 7B model there are 1,400, about which a forked writer tells more than a pipe holds."""
    with writer(tmp_path, run, in_background) as checkpoints:
        checkpoints.save(3, state_of(2000))
    found = dist_checkpointing.load_plain_tensors(str(find_checkpoint(tmp_path)))
    assert all(torch.equal(found[f"w{number}"], torch.full((2,), float(number))) for number in range(2000))
    assert read_info(find_checkpoint(tmp_path))["run"] == asdict(run)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_cannot_be_hashed_is_one_line(run, tmp_path, monkeypatch, in_background):
    with writer(tmp_path, run, in_background) as checkpoints:
        checkpoints.save(3, state_of(2))

    def fails(folder, rank):
        raise OSError("the disk has gone")

    monkeypatch.setattr(checkpoint_writer, "own_digests", fails)
    with (
        pytest.raises(OSError, match=FAILURE + "the disk has gone"),
        writer(tmp_path, run, in_background) as checkpoints,
    ):
        checkpoints.save(6, state_of(2))
    assert find_checkpoint(tmp_path).name == "step-00000003"


def save_where_one_disk_is_full(folder, run, in_background: bool) -> str:
    """Returns the error of a process, of which the second cannot write the first of its files."""
    initialize_distributed()
    rank, real_write = torch.distributed.get_rank(), filesystem_async._write_item

    @wraps(real_write)
    def write(*args, **options):
        if rank == 1 and threading.current_thread() is not threading.main_thread():
            raise OSError("No space left on device")
        return real_write(*args, **options)

    filesystem_async._write_item = write
    names = [f"rank{rank}-{number}" for number in range(20)]
    state = {name: ShardedTensor.from_rank_offsets(name, torch.zeros(2)) for name in names}
    with pytest.raises(OSError, match=FAILURE) as error, writer(folder, run, in_background) as checkpoints:
        checkpoints.save(3, state)
    shutdown_distributed()
    return str(error.value)


@pytest.mark.parametrize("in_background", [False, True])
def test_all_processes_learn_that_one_could_not_write(stage2, tmp_path, in_background):
    run = describe_run(stage2, ["shards"], 6)
    first, second = run_together(2, save_where_one_disk_is_full, tmp_path, run, in_background)
    assert "a file could not be written (<class 'OSError'>); is the disk full?" in first
    assert second.endswith("one of the processes failed, and says why")


def test_a_folder_that_cannot_be_removed_does_not_end_a_run(run, tmp_path, monkeypatch):
    said: list[str] = []

    def busy(folder):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(
        checkpoint_writer.shutil, "rmtree", lambda folder, ignore_errors=False: ignore_errors or busy(folder)
    )
    with CheckpointWriter(tmp_path, run, {"config": {}}, 1, False, said.append) as checkpoints:
        checkpoints.save(3, state_of(2))
        checkpoints.save(6, state_of(2))
    assert find_checkpoint(tmp_path).name == "step-00000006"
    assert any("step-00000003.part could not be removed; the next save tries again" in line for line in said)


def test_a_writer_that_is_killed_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "own_digests", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match=FAILURE + "a process ended before"), writer(tmp_path, run, True) as checkpoints:
        checkpoints.save(3, state_of(2))


def test_a_writer_ends_with_a_run_that_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "own_digests", lambda *args: time.sleep(600))
    with pytest.raises(KeyboardInterrupt), writer(tmp_path, run, True) as checkpoints:
        checkpoints.save(3, state_of(2))
        assert len(active_children()) == 1
        raise KeyboardInterrupt
    for child in active_children():
        child.join(60)
    assert not active_children() and not list(tmp_path.glob("checkpoints/step-????????"))


def test_a_checkpoint_that_cannot_be_written_is_one_line(stage2, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise CheckpointException("save", {0: (OSError("no space left on device"), StackSummary())})

    monkeypatch.setattr("pipeline.checkpoint.writer.dist_checkpointing.save", full_disk)
    with pytest.raises(OSError, match="could not be written; the one before it is whole: .*no space left"):
        train(stage2.model_copy(update={"run_dir": tmp_path}))
    shutdown_distributed()


def test_checkpoints_keep_the_scales_of_delayed_fp8(stage2, tmp_path, monkeypatch):
    """Megatron-core's own layers stand in for Transformer Engine's, which exist on GPUs only."""

    def set_scales(layer, scales):
        assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
        layer.scales = scales

    for kind in (ColumnParallelLinear, RowParallelLinear):
        monkeypatch.setattr(kind, "get_extra_state", lambda layer: layer.scales)
        monkeypatch.setattr(kind, "set_extra_state", set_scales)
    state = build(stage2, initialize_distributed())
    state.stages[0].config.fp8, state.stages[0].config.fp8_recipe = "hybrid", "delayed"
    layers = [
        layer for layer in state.stages[0].modules() if isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    ]
    for number, layer in enumerate(layers):
        layer.scales = torch.tensor([number], dtype=torch.uint8)
    with CheckpointWriter(tmp_path, state.run, {"config": {}}, 1, False, print) as writer:
        writer.save(3, sharded_state(state.stages, state.optimizer, state.groups))
    for layer in layers:
        layer.scales = torch.tensor([], dtype=torch.uint8)
    checkpoint = find_checkpoint(tmp_path)
    assert restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups) == 3
    assert torch.cat([cast(Tensor, layer.scales) for layer in layers]).tolist() == [*range(2 * 7 + 1)]
    assert not any("extra" in name for name in load_trained_parameters(checkpoint))
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
    shutdown_distributed()
