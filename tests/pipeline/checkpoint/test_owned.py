"""Every process writes and reads what it owns of the optimizer's state, and never holds what another owns."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.checkpoint.checkpoint import restore_checkpoint, sharded_state
from pipeline.checkpoint.owned import rectangles
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config import RunConfig
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.optimizer import num_updates, owned_ranges
from pipeline.state import TrainState, build
from tests.pipeline.test_parallel import divided, trained_parameters
from tests.processes import run_together

ELEMENT_BYTES = 4 + 4 + 4 + 4  # of a trained element in fp32: the model's weight, the optimizer's, two moments


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_beginning_of_one():
    assert [*rectangles(3, 17, (4, 5))] == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 5), (1, 6), (6, 1), (2, 3, 4)], ids=str)
def test_rectangles_are_their_range_and_in_its_order(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = [
                whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in rectangles(start, stop, shape)
            ]
            assert torch.equal(torch.cat([*found, whole.flatten()[:0]]), torch.arange(start, stop))
            assert len(found) <= 2 * len(shape) - 1


class Made(TorchDispatchMode):
    """Notes bytes of the largest tensor of numbers that any operation gives, and of all those that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.device.type != "meta":
            self.largest = max(self.largest, result.nbytes)
            is_new = any(word in str(func) for word in ("clone", "copy.", "empty", "zeros", "cat"))
            self.total += result.nbytes * is_new
        return result


def hold_no_more_than_their_own(config: RunConfig, before, num_elements: int, largest: int) -> int:
    """Takes up a checkpoint and writes it again; returns the bytes that this process wrote."""
    state = build(config, initialize_distributed(config.parallel))
    num_ranks = state.groups.dp.size()
    own = -(-num_elements // num_ranks) * ELEMENT_BYTES
    with Made() as loading:
        step = restore_checkpoint(before, state.run, state.stages, state.optimizer, state.groups)
    assert loading.largest <= largest
    assert loading.total <= num_elements * 4  # of weights, which all have, those that another read
    forget_what_others_own(state)
    with (
        Made() as saving,
        CheckpointWriter(config.run_dir, state.run, {"config": {}}, 1, False, lambda line: None) as writer,
    ):
        described = sharded_state(state.stages, state.optimizer, state.groups)
        writer.save(step, described)
    assert saving.largest <= largest and saving.total <= own * 1.02
    written = sum(entry.data.nbytes for entry in described["optimizer"]["owned"].values())
    shutdown_distributed()
    return written


@torch.no_grad()
def forget_what_others_own(state: TrainState) -> None:
    """Spoils the weights that other processes have updated, as if they were still being collected."""
    own = {owned.parameter: (owned.start, owned.stop) for owned in owned_ranges(state.optimizer)}
    for parameter in state.stages[0].parameters():
        start, stop = own.get(parameter, (0, 0))
        flat = parameter.view(-1)
        flat[:start], flat[stop:] = torch.nan, torch.nan


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_process_holds_or_writes_what_another_owns(deep_stage2, tmp_path, num_processes):
    """Of a checkpoint that one process wrote, and of one written with as many."""
    initialize_distributed()
    state = build(deep_stage2, torch.device("cpu"))
    sizes = [parameter.numel() for stage in state.stages for parameter in stage.parameters()]
    shutdown_distributed()
    before = find_checkpoint(deep_stage2.run_dir)
    expected = trained_parameters(deep_stage2)
    for name in ("first", "second"):
        config = divided(deep_stage2, tmp_path / name)
        hold = partial(hold_no_more_than_their_own, config, before, sum(sizes), max(sizes) * 4)
        written = run_together(num_processes, hold)
        assert sum(written) == sum(sizes) * ELEMENT_BYTES
        assert max(written) <= sum(sizes) * ELEMENT_BYTES / num_processes * 1.02  # buffers are filled up
        before = find_checkpoint(config.run_dir)
    found = trained_parameters(config)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def states_of_the_shared_projector(config: RunConfig, checkpoint) -> dict[str, list[list[float]]]:
    """Returns the moments of each parameter on this process, one for each of its stages."""
    state = build(config, initialize_distributed(config.parallel))
    restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups)
    names = {parameter: name for stage in state.stages for name, parameter in stage.named_parameters()}
    found: dict[str, list[list[float]]] = {}
    for owned in owned_ranges(state.optimizer):
        found.setdefault(names[owned.parameter], []).append(owned.states["exp_avg"].tolist())
    shutdown_distributed()
    return found


@pytest.mark.slow  # four processes, which no smaller world stands for: with one replica torch reads every copy
def test_every_copy_of_the_shared_projector_is_loaded(deep_stage1, tmp_path):
    config = divided(deep_stage1, tmp_path, pp=2, chunks_per_rank=2)
    for found in run_together(4, partial(states_of_the_shared_projector, config, find_checkpoint(deep_stage1.run_dir))):
        assert found and all(len(copies) == 2 and copies[0] == copies[1] for copies in found.values())
        assert all(any(copies[0]) for copies in found.values())


def test_checkpoints_of_the_form_before_are_taken_up(stage2, tmp_path):
    """Megatron-core's `fully_reshardable`, in which one process wrote the whole optimizer, and its own step count."""

    def taken_up(checkpoint) -> tuple[TrainState, list[Tensor], int]:
        state = build(stage2, torch.device("cpu"))
        restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups)
        found = [tensor for owned in owned_ranges(state.optimizer) for tensor in owned.states.values()]
        return state, [*found, *state.stages[0].state_dict().values()], num_updates(state.optimizer)

    initialize_distributed()
    state, expected, count = taken_up(find_checkpoint(stage2.run_dir))
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": state.groups.dp_cp}
    weights = state.stages[0].sharded_state_dict(metadata=metadata)
    with CheckpointWriter(tmp_path, state.run, {"config": {}}, 1, False, lambda line: None) as writer:
        optimizer = state.optimizer.sharded_state_dict(dict(weights), metadata=metadata)
        writer.save(6, {"stage0": weights, "optimizer": optimizer, "rng": torch.get_rng_state()})
    _, found, found_count = taken_up(find_checkpoint(tmp_path))
    shutdown_distributed()
    assert count == found_count == 6 and len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True) if one is not None)
