"""One optimizer step: encode the images of the batch together, run the pipeline's schedule, sum the loss, update."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from common.console import count_text
from model.compute import compute_dtype
from model.pack import Pack, rows_of_pack
from model.transfer import read_values
from model.vision import encode_together
from pipeline.bad_samples import check_bad_samples, gather_bad_samples, leave_out
from pipeline.config import DataConfig, RunConfig
from pipeline.data.batches import GlobalBatch
from pipeline.metrics import StepMetrics, peak_memory, reserved_memory
from pipeline.optimizer import clip_gradients, learning_rate, update_weights
from pipeline.phases import own_seconds, slowest
from pipeline.replicas import clear_gradients, gather_weights
from pipeline.stage_messages import StageMessages
from pipeline.state import TrainState


def train_step(state: TrainState, batch: GlobalBatch, wait_seconds: float) -> StepMetrics:
    """Runs one optimizer step over a global batch and returns what it measured.

    Once any process has been asked to stop, `state.is_stopping` is set on all, and `state.is_any_writing` as long as
    any of them `is_writing`.

    Raises:
        ValueError: no sample has a target, the targets are not those of the plan, or the loss or the gradient norm is
            not finite; the last checkpoint is sound.
    """
    started, phases = time.monotonic(), state.phases
    phases.add("data", wait_seconds)
    if state.config.data.max_bad_samples:
        batch = without_bad_samples(state, batch)
    if not batch.counts.num_targets:
        raise ValueError(nothing_to_learn(batch, state.config.data))
    rate = set_learning_rate(state, batch.step)
    clear_gradients(state.wrapped)
    with phases("encode"):
        inputs = model_inputs(state, batch)
    with phases("forward_backward"):
        sums, num_targets = forward_and_backward(state, inputs, batch.counts.num_targets)
    totals = sum_over_replicas(sums, num_targets, state)
    outcome = read_outcome(totals, clip_gradients(state.optimizer))
    phase_seconds, (slowest_rank, slowest_fraction) = phases.read(), slowest(outcome.own_seconds)
    state.own_seconds = own_seconds(phase_seconds)
    state.is_stopping, state.is_any_writing = outcome.is_stopping, outcome.is_writing
    loss = check_outcome(outcome, batch, state.config)
    with phases("optimizer"):
        update_weights(state.optimizer)
        gather_weights(state.wrapped)
    state.step = batch.step + 1
    seconds = time.monotonic() - started + wait_seconds
    return StepMetrics(
        step=state.step,
        epoch=batch.epoch,
        loss=loss,
        grad_norm=outcome.grad_norm,
        learning_rate=rate,
        step_seconds=seconds,
        data_wait_fraction=wait_seconds / seconds,
        counts=batch.counts,
        flops=batch.counts.training_flops + batch.counts.num_images * state.flops_per_image,
        num_processes=torch.distributed.get_world_size(),
        peak_memory_bytes=peak_memory(),
        reserved_memory_bytes=reserved_memory(),
        slowest_rank=slowest_rank,
        slowest_fraction=slowest_fraction,
        phase_seconds=phase_seconds,
    )


def set_learning_rate(state: TrainState, step: int) -> float:
    """Returns the learning rate of a step, after telling the optimizer."""
    rate = learning_rate(step, state.source.num_steps, state.config.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    return rate


def forward_and_backward(
    state: TrainState, inputs: list[tuple[Pack, Tensor]], num_planned: int
) -> tuple[list[Tensor], int]:
    """Returns the summed loss of each micro-batch (last stages only) and the number of targets in all of them.

    The gradients it leaves are those of the mean over the `num_planned` targets of the global batch, summed over the
    replicas.
    """
    packs = [pack for pack, _ in inputs]
    rows_in = [[stage.rows_before(stage.stage.layers.start, pack) for pack in packs] for stage in state.stages]
    rows_out = [[stage.rows_before(stage.stage.layers.stop, pack) for pack in packs] for stage in state.stages]
    model_config = state.wrapped[0].config
    sums = get_forward_backward_func()(
        forward_step_func=partial(forward_step, num_planned=num_planned),
        data_iterator=[iter(inputs) for _ in state.wrapped],
        model=[*state.wrapped],
        num_microbatches=len(inputs),
        seq_length=state.config.data.max_text_tokens_per_pack,
        micro_batch_size=1,
        p2p_communicator=StageMessages(state.groups.pp, model_config, rows_in, rows_out),
        pg_collection=state.groups,
    )
    return sums, sum(pack.num_targets for pack in packs)


class Outcome(NamedTuple):
    """What the forward and backward passes of all replicas came to, in the order of the numbers on the device."""

    loss_sum: float
    num_targets: float
    num_stopping: float
    num_writing: float
    own_seconds: tuple[float, ...]
    grad_norm: float

    @property
    def is_stopping(self) -> bool:
        """Whether any process was asked to stop."""
        return self.num_stopping > 0

    @property
    def is_writing(self) -> bool:
        """Whether any process still writes a checkpoint in the background."""
        return self.num_writing > 0


def read_outcome(totals: Tensor, grad_norm: Tensor) -> Outcome:
    """Returns what a step came to. Here, and nowhere else in a step, the host waits for the GPU.

    The update of the weights is still to come, so that the GPU is busy while the host prepares the next step.
    """
    loss_sum, num_targets, num_stopping, num_writing, *own, norm = read_values(
        torch.cat([totals, grad_norm.to(totals.device).double()])
    )
    return Outcome(loss_sum, num_targets, num_stopping, num_writing, tuple(own), norm)


def check_outcome(outcome: Outcome, batch: GlobalBatch, config: RunConfig) -> float:
    """Returns the mean loss of a step that may update the weights.

    Raises:
        ValueError: It may not: the targets are not those of the plan, or loss or gradient norm are not finite.
    """
    planned = batch.counts.num_targets
    if outcome.num_targets != planned:
        raise ValueError(
            f"step {batch.step}: the samples have {count_text(int(outcome.num_targets), 'target')}, but the length "
            f"table says {planned:,}; stopped before the optimizer step. Delete lengths-*.npz in "
            f"data.cache={config.data.cache}"
        )
    loss = outcome.loss_sum / planned
    if not math.isfinite(loss):
        raise ValueError(
            f"step {batch.step}: the loss is {loss}; stopped before the optimizer step. "
            f"Lower optim.learning_rate={config.optim.learning_rate:g} or look at the samples of this step"
        )
    if not math.isfinite(outcome.grad_norm):
        raise ValueError(
            f"step {batch.step}: the gradient norm is {outcome.grad_norm}; stopped before the optimizer step. "
            f"Lower optim.learning_rate={config.optim.learning_rate:g} or look at the samples of this step"
        )
    return loss


def model_inputs(state: TrainState, batch: GlobalBatch) -> list[tuple[Pack, Tensor]]:
    """Returns every micro-batch's pack and visual features [I, C], on this process's device."""

    def encode(pixels_B3HW: Tensor) -> Tensor:
        return state.tower(state.source.image_processor.normalize(pixels_B3HW))

    packs = [micro_batch.pack for micro_batch in batch.micro_batches]
    # Each part was pinned by itself, and what is made of pinned parts on the host is not.
    shares = [micro_batch.pixels_B3HW.to(state.device, non_blocking=True) for micro_batch in batch.micro_batches]
    share_B3HW = torch.cat(shares)
    counts = [pack.num_images for pack in packs]
    vision, dtype = state.config.model.vision, compute_dtype(state.config.compute)
    features_BPC = torch.zeros(0, vision.num_tokens, vision.hidden_size, dtype=dtype, device=state.device)
    if sum(counts):
        window = state.config.train.image_batch_size
        features_BPC = encode_together(encode, share_B3HW, sum(counts), window, state.groups.mp)
    return [
        (pack.to(state.device), rows_of_pack(part, pack.num_visual_padding))
        for pack, part in zip(packs, features_BPC.split(counts), strict=True)
    ]


def forward_step(
    inputs: Iterator[tuple[Pack, Tensor]], chunk: torch.nn.Module, num_planned: int
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Returns what a chunk of the model makes of its next micro-batch, and what the schedule is to make of losses."""
    pack, features_IC = next(inputs)
    return chunk(pack, features_IC), partial(sum_losses, num_planned=num_planned)


def sum_over_replicas(sums: list[Tensor], num_targets: int, state: TrainState) -> Tensor:
    """Returns f64[4 + processes] on every process, summed over all.

    Losses, targets, how many are asked to stop, how many still write a checkpoint; then the seconds of each process,
    its own, of the step before.

    Only last stages bring losses, the same ones on all their tensor-parallel ranks; all processes of a replica have the
    same targets.
    """

    def number(value: float) -> Tensor:  # made by the GPU: a copy of it from here would be waited for
        return torch.full((), value, dtype=torch.float64, device=state.device)

    is_last = bool(sums) and state.groups.tp.rank() == 0
    values = torch.stack(
        [
            torch.stack(sums).sum().double() if is_last else number(0),
            number(num_targets if state.groups.mp.rank() == 0 else 0),
            number(state.stop.has_come()),
            number(state.is_writing),
        ]
    )
    own = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64, device=state.device)
    own[torch.distributed.get_rank()].fill_(state.own_seconds)
    values = torch.cat([values, own])
    torch.distributed.all_reduce(values)
    return values


def without_bad_samples(state: TrainState, batch: GlobalBatch) -> GlobalBatch:
    """Returns the batch without the samples of which any process met a bad image, after counting them.

    Raises:
        ValueError: The run has met more than `data.max_bad_samples`.
    """
    found = gather_bad_samples(batch.bad_samples, state.device)
    config, new = state.config, found.keys() - state.bad_samples.keys()
    state.bad_samples |= {number: found[number] for number in sorted(new)}
    if new:
        limit = config.data.max_bad_samples
        check_bad_samples(state.bad_samples, limit, config.run_dir, batch.step + 1, sorted(new))
    if not found:
        return batch
    schedule = state.source.schedule
    numbers = schedule.samples(batch.step)
    bad = numbers[np.isin(numbers, list(found))]  # a batch may hold a sample more than once
    return leave_out(batch, bad.tolist(), int(schedule.table.column("num_targets")[bad].sum()))


def nothing_to_learn(batch: GlobalBatch, data: DataConfig) -> str:
    """Returns why a batch without targets ends the run."""
    counts = batch.counts
    held = f"{counts.num_skipped} were skipped, {counts.num_bad_samples} bad, {counts.num_samples} have no target"
    way_out = (
        f"does data.template={data.template} fit these shards? plain is for captions (one question, one answer), "
        "v1 for conversations"
    )
    if counts.num_truncated_tokens:
        way_out = (
            f"data.max_positions={data.max_positions} cut {count_text(counts.num_truncated_tokens, 'text token')} of "
            "them; raise it, or leave out rows whose images alone fill it"
        )
    return f"step {batch.step}: no sample has anything to learn ({held}); {way_out}"


def sum_losses(losses: Tensor, num_planned: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what to differentiate, a number of targets that nobody reads, and the summed loss to report.

    Divided here, before the backward pass, the whole buffer of gradients need not be divided after it.
    """
    total = losses.sum()
    return total / num_planned, torch.zeros((), dtype=torch.int, device=losses.device), total.detach().clone()
