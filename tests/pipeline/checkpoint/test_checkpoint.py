"""How checkpoints are written: whole or not there, in the background too, with an error that says why."""

import os
import pickle
import re
import resource
import signal
import time
from dataclasses import asdict
from functools import partial
from multiprocessing import active_children
from typing import cast

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from pipeline.checkpoint import writer as checkpoint_writer
from pipeline.checkpoint.checkpoint import load_trained_parameters, restore_checkpoint, sharded_state
from pipeline.checkpoint.run_info import describe_run, find_checkpoint, latest_checkpoint, read_info
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.state import build
from tests.full_disk import mount_small_disk, no_file_larger_than, obey_permissions
from tests.processes import run_together


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
    failure = (
        "step-00000006 could not be written: the disk has gone; step-00000003 is whole, the run goes on from there$"
    )
    with pytest.raises(OSError, match=failure), writer(tmp_path, run, in_background) as checkpoints:
        checkpoints.save(6, state_of(2))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]


# What is small enough to be written, and what is not: 40 tensors make 40 kB of each of four files, and `.metadata`.
TOO_LARGE = {
    "__0_[0-9].distcp": ({}, 10_000),
    ".metadata": ({"num_tensors": 40, "num_elsewhere": 400}, 50_000),
    "info.json": ({"num_tensors": 4, "more": "x" * 60_000}, 50_000),
}


def save_beyond_a_limit(folder, run, in_background: bool, limit: int, num_tensors=40, num_elsewhere=0, more=""):
    """Returns the error of this process, of which only the first may write no large file."""
    initialize_distributed()
    rank = torch.distributed.get_rank()
    state = {
        name: ShardedTensor.from_rank_offsets(name, torch.zeros(2), replica_id=int(owner != rank))
        for owner, number in ((0, num_tensors), (1, num_elsewhere))
        for name in (f"rank{owner}-{i}" for i in range(number))
    }

    def save(step: int, tensors: dict, config: str) -> None:
        with CheckpointWriter(folder, run, {"config": config}, 2, in_background, lambda line: None) as checkpoints:
            checkpoints.save(step, tensors)

    save(3, {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(2), replica_id=rank)}, "")
    with no_file_larger_than(limit if rank == 0 else resource.RLIM_INFINITY), pytest.raises(OSError) as error:
        save(6, state, more)
    save(6, state, more)  # with room, the same goes well
    shutdown_distributed()
    return str(error.value)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("file", TOO_LARGE)
def test_what_one_process_cannot_write_is_one_line_of_all(stage2, tmp_path, file, in_background):
    options, limit = TOO_LARGE[file]
    save = partial(save_beyond_a_limit, tmp_path, describe_run(stage2, ["shards"], 6), in_background, limit, **options)
    said = run_together(2, save)
    assert said[0] == said[1]
    failure = (
        rf"{tmp_path}/checkpoints/step-00000006 could not be written: File too large \(\S*/step-00000006.part/{file}"
    )
    assert re.match(failure, said[0]), said[0]
    assert "raise the limit (see `ulimit -f`), then start again; step-00000003 is whole, the run goes on" in said[0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003", "step-00000006"]


def save_on_a_small_disk(folder, run, in_background: bool, read_only: bool) -> tuple[str, list[str]] | str:
    """Returns the error and what lies there afterwards; or why there is no such disk."""
    if refusal := mount_small_disk(folder, 200_000, read_only):
        return refusal
    initialize_distributed()
    state = {"large": ShardedTensor.from_rank_offsets("large", torch.zeros(100_000))}
    with pytest.raises(OSError) as error, writer(folder, run, in_background) as checkpoints:
        checkpoints.save(3, state)
    left = os.listdir(folder / "checkpoints") if not read_only else []
    shutdown_distributed()
    return str(error.value), left


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_full_disk_is_said_and_left_with_room(stage2, tmp_path, in_background, read_only):
    run = describe_run(stage2, ["shards"], 6)
    (seen,) = run_together(1, save_on_a_small_disk, tmp_path, run, in_background, read_only)
    if isinstance(seen, str):
        pytest.skip(seen)
    said, left = seen
    assert not left and said.startswith(f"{tmp_path}/checkpoints/step-00000003 could not be written: ")
    assert said.endswith("there is no checkpoint yet")
    if read_only:
        assert "Read-only file system; mount it for writing" in said
    else:
        free = r"it takes 400.0 kB; 20\d.\d kB are free in \S*/checkpoints: make room, then start again"
        assert re.search(rf"No space left on device \(\S*/__0_0.distcp\); {free}", said), said


def save_where_writing_is_forbidden(folder, run, in_background: bool) -> str:
    """Returns what is said of a second checkpoint, before which somebody takes the right to write."""
    obey_permissions()
    initialize_distributed()
    state = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(2))}
    with pytest.raises(OSError) as error, writer(folder, run, in_background) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.publish()
        (folder / "checkpoints").chmod(0o555)
        checkpoints.save(6, state)
    (folder / "checkpoints").chmod(0o755)
    shutdown_distributed()
    return str(error.value)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_folder_that_may_not_be_written_any_more_is_one_line(stage2, tmp_path, in_background):
    run = describe_run(stage2, ["shards"], 6)
    (said,) = run_together(1, save_where_writing_is_forbidden, tmp_path, run, in_background)
    assert said.startswith(f"{tmp_path}/checkpoints/step-00000006 could not be written: Permission denied")
    assert said.endswith("step-00000003 is whole, the run goes on from there")
    assert "give this user the right to it" in said and os.listdir(tmp_path / "checkpoints") == ["step-00000003"]


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
    with (
        pytest.raises(OSError, match="03 could not be written: the process that wrote it was ended before it was done"),
        writer(tmp_path, run, True) as checkpoints,
    ):
        checkpoints.save(3, state_of(2))


def test_whether_a_process_writes_is_asked_of_itself_alone(run, tmp_path, monkeypatch):
    """A collective in each step beside a save would let its host wait for the GPU."""

    def may_not_be_called(*args, **kwargs):
        raise AssertionError("a collective")

    go_on, real_digests = tmp_path / "go on", checkpoint_writer.own_digests

    def digests(*args):
        while not go_on.exists():
            time.sleep(0.01)
        return real_digests(*args)

    monkeypatch.setattr(checkpoint_writer, "own_digests", digests)
    with writer(tmp_path, run, True) as checkpoints:
        assert not checkpoints.is_writing()
        checkpoints.save(3, state_of(2))
        with monkeypatch.context() as patch:
            for name in ("all_reduce", "all_gather_object", "gather_object", "broadcast_object_list", "barrier"):
                patch.setattr(torch.distributed, name, may_not_be_called)
            assert checkpoints.is_writing()
            go_on.touch()
            while checkpoints.is_writing():
                time.sleep(0.01)
        assert latest_checkpoint(tmp_path) is None
        checkpoints.publish()
        assert latest_checkpoint(tmp_path) is not None


def test_a_writer_ends_with_a_run_that_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "own_digests", lambda *args: time.sleep(600))
    before = set(active_children())
    with pytest.raises(KeyboardInterrupt), writer(tmp_path, run, True) as checkpoints:
        checkpoints.save(3, state_of(2))
        (child,) = set(active_children()) - before
        raise KeyboardInterrupt
    child.join(60)
    assert not child.is_alive() and not list(tmp_path.glob("checkpoints/step-????????"))


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
        layer.scales = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": number})), dtype=torch.uint8)
    torch.manual_seed(11)
    random_state = torch.get_rng_state()
    with CheckpointWriter(tmp_path, state.run, {"config": {}}, 1, False, print) as writer:
        writer.save(3, sharded_state(state.stages, state.optimizer, state.groups))
    torch.manual_seed(12)
    for layer in layers:
        layer.scales = torch.tensor([], dtype=torch.uint8)
    checkpoint = find_checkpoint(tmp_path)
    assert restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups) == 3
    assert torch.equal(torch.get_rng_state(), random_state)
    found = [pickle.loads(cast(Tensor, layer.scales).numpy().tobytes())["scale_fwd"] for layer in layers]
    assert found == [*range(2 * 7 + 1)]
    assert not any("extra" in name for name in load_trained_parameters(checkpoint))
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
    shutdown_distributed()
