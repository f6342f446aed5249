"""One training run, from its last checkpoint (or its start) to its end: `train()` is the table of contents."""

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from common.console import count_text
from common.files import locked, write_whole
from common.version import code_version
from pipeline.bad_samples import read_bad_samples
from pipeline.checkpoint.checkpoint import choose_checkpoint, restore_checkpoint, set_aside_newer, sharded_state
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config import RunConfig, to_yaml
from pipeline.data.batches import GlobalBatch
from pipeline.distributed import broadcast_from_rank0, initialize_distributed, shutdown_distributed, told_once
from pipeline.metrics import MetricsLog, check_log
from pipeline.profiling import Profiler
from pipeline.state import TrainState, build
from pipeline.step import train_step
from pipeline.stop import STATUS, check_no_stop_file

FEW_STEPS = 5  # what is hardly a training run


@told_once()
def train(config: RunConfig) -> None:
    """Runs a phase from its last checkpoint (or from its start) to its end.

    Raises:
        ValueError: the base, the shards or a checkpoint do not fit the configuration, or the loss is not finite.
        SystemExit: it was asked to stop, and has saved; the status is that of a process which SIGTERM ended.
    """
    device = initialize_distributed(config.parallel)
    broadcast_from_rank0(lambda: check_start(config))
    state = build(config, device)
    with entered_on_rank0(locked(config.run_dir)):
        restore(state)
        run_steps(state)
    torch.distributed.barrier()  # a launcher that sees one process end with a status ends the others at once
    shutdown_distributed()
    if state.step < state.source.num_steps:
        raise SystemExit(STATUS)


def run_steps(state: TrainState) -> None:
    """Fetches, steps, logs and saves until the run is at its end or somebody asks it to stop."""
    config = state.config
    log = MetricsLog(config.run_dir, config.log, state.step, state.source.num_steps, _is_first_rank())
    rank, on_gpu = torch.distributed.get_rank(), state.device.type == "cuda"
    profiler = Profiler(config.run_dir / "profile", config.log.profile_steps, rank, on_gpu)
    with entered_on_rank0(log), state.stop, garbage_kept(), checkpoint_writer(state, log) as writer:
        introduce(state, log)
        state.bad_samples = broadcast_from_rank0(lambda: read_bad_samples(config.run_dir, state.step))
        for batch, wait_seconds in timed(state.source.batches(state.step)):
            for problem in batch.problems:
                log.say(problem)
            num_bad = len(state.bad_samples)
            profiler.before(state.step + 1)
            state.is_writing = writer.is_writing()
            log.step(train_step(state, batch, wait_seconds))
            profiler.after(state.step, state.step == state.source.num_steps or state.is_stopping)
            if state.step % config.train.gc_every_steps == 0:
                gc.collect()
            for reason in list(state.bad_samples.values())[num_bad:]:
                log.say(f"left out: {reason}")
            if log.failure is not None:
                state.stop.ask()  # which all learn in the next step
            if not state.is_any_writing:
                writer.publish()
            if due(state):
                started = time.monotonic()
                writer.save(state.step, sharded_state(state.stages, state.optimizer, state.groups))
                state.phases.add("save", time.monotonic() - started)
            for file in profiler.write():  # behind the save: who asks a run to stop may not wait for it
                log.say(f"wrote {file}")
            if state.is_stopping:
                break
        if state.step < state.source.num_steps and log.failure is None:
            first = f"remove {state.stop.file}, then " if state.stop.by_file() else ""
            log.say(f"stopped after step {state.step}, as asked; {first}the same command goes on from there")
    broadcast_from_rank0(log.check)


@contextmanager
def entered_on_rank0(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enters a context on the first rank; all raise what keeps it from that."""
    with ExitStack() as held:

        def enter() -> None:
            held.enter_context(context)

        broadcast_from_rank0(enter)
        yield


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Keeps Python from collecting garbage when it likes.

    It would stop one process for up to a second, at a moment of its own, and all others would wait for that one in
    their next collective; with many processes nearly every step has such a moment. As in torchtitan and Megatron-LM all
    collect after the same steps. What has no cycles is freed at once as ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_start(config: RunConfig) -> None:
    """Makes sure, before anything takes time, that a run can report and that nobody wants it stopped.

    Raises:
        ValueError: It cannot, or somebody does.
    """
    check_log(config.log)
    check_no_stop_file(config.run_dir)


def restore(state: TrainState) -> None:
    """Takes up the run where its checkpoints say, if it has any.

    Raises:
        ValueError: The checkpoint is damaged or of another run.
    """
    config = state.config
    checkpoint = choose_checkpoint(config.run_dir, config.checkpoint.resume)
    if checkpoint is None:
        return
    state.step = restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups)
    for folder in broadcast_from_rank0(lambda: set_aside_newer(checkpoint)):
        if _is_first_rank():
            print(f"renamed to {folder}: this run goes on from {checkpoint.name}", flush=True)


def due(state: TrainState) -> bool:
    """Whether the step that has just ended is one to save after."""
    is_last = state.step == state.source.num_steps
    return state.step % state.config.checkpoint.save_every_steps == 0 or is_last or state.is_stopping


def checkpoint_writer(state: TrainState, log: MetricsLog) -> CheckpointWriter:
    """Returns what writes this run's checkpoints."""
    settings = state.config.checkpoint
    extra = {"config": state.config.model_dump(mode="json"), "code": code_version()}
    return CheckpointWriter(state.config.run_dir, state.run, extra, settings.keep_last, settings.in_background, log.say)


def introduce(state: TrainState, log: MetricsLog) -> None:
    """Says what is about to happen and stores the resolved configuration in the run folder."""
    broadcast_from_rank0(lambda: write_whole(state.config.run_dir / "config.yaml", to_yaml(state.config).encode()))
    parameters = {name: p for stage in state.stages for name, p in stage.named_parameters()}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    here = " on this process" if state.groups.mp.size() > 1 else ""
    num_trained, num_all = (sum(parameters[name].numel() for name in names) for names in (trained, parameters))
    log.say(
        f"{state.config.phase}: training {num_trained:,} of {count_text(num_all, 'parameter')}{here} "
        f"({count_text(len(trained), 'tensor')}, {trained[0]} ... {trained[-1]}); the vision encoder is frozen"
    )
    log.say(
        f"{count_text(state.source.schedule.num_drawn, 'sample')} an epoch, "
        f"{count_text(state.source.num_steps, 'step')} of {state.config.train.global_batch_size} on "
        f"{count_text(state.groups.dp.size(), 'data-parallel rank')}, from step {state.step}; "
        f"run folder {state.config.run_dir}"
    )
    for line in broadcast_from_rank0(state.source.remarks):
        log.say(line)
    if 0 < state.source.num_steps < FEW_STEPS:
        log.say(
            f"steps: only {state.source.num_steps}, which is hardly any training; with so few samples, lower "
            "train.global_batch_size or raise train.num_epochs, in another run_dir"
        )
    if (steps := state.config.log.profile_steps) and state.step >= steps[1]:
        log.say(f"log.profile_steps={list(steps)}: nothing is recorded, this run goes on behind them")
    if state.step == state.source.num_steps:
        log.say("this run is finished; set another run_dir to train again")


def timed(batches: Iterator[GlobalBatch]) -> Iterator[tuple[GlobalBatch, float]]:
    """Yields each batch and the seconds the loop waited for it."""
    while True:
        started = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - started


def _is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0
