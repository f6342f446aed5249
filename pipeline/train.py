"""Trains one stage of SAISA.

    torchrun --nproc-per-node 2 -m pipeline.train --config configs/demo-stage1.yaml train.max_steps=20

The same command continues an interrupted run from its last checkpoint. `train()` is the table of contents.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console
from torch import Tensor

from data_prep.console import run
from data_prep.output import code_version
from model.backend import check_fp8
from model.compute import build_transformer_config
from model.config import differences
from model.hf.vision_saisa import VisionTower
from model.pack import Pack
from model.parallel import split_layers, stages_of_rank
from model.saisa import SaisaModel
from model.vision import encode_together, load_vision_tower, rows_of_pack
from pipeline.checkpoint import CheckpointWriter, restore_checkpoint, set_aside_newer, sharded_state
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.data import BatchSource, GlobalBatch, Reader, build_source, load_table, open_shards
from pipeline.distributed import computed_once, initialize_distributed, shutdown_distributed
from pipeline.metrics import MetricsLog, StepMetrics
from pipeline.optimizer import build_optimizer, freeze, learning_rate, wrap
from pipeline.run_info import RunInfo, checkpoint_to_resume, describe_run
from pipeline.start import base_model_config, initial_parameters
from pipeline.stop import STATUS, StopRequest


@dataclass
class TrainState:
    """Everything a step needs; `step` counts finished optimizer steps."""

    config: RunConfig
    device: torch.device
    groups: ProcessGroupCollection
    stages: list[SaisaModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    tower: VisionTower
    source: BatchSource
    run: RunInfo
    step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    is_stopping: bool = False


def train(config: RunConfig) -> None:
    """Runs a stage from its last checkpoint (or from its start) to its end.

    Raises:
        ValueError: the base, the shards or a checkpoint do not fit the configuration, or the loss is not finite.
    """
    device = initialize_distributed(config.parallel)
    state = build(config, device)
    restore(state)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (
        MetricsLog(config.run_dir, config.log, state.step, state.source.num_steps, _is_first_rank()) as log,
        checkpoint_writer(state, log) as writer,
        state.stop,
    ):
        introduce(state, log)
        for batch, wait_seconds in timed(state.source.batches(state.step)):
            for problem in batch.problems:
                log.say(problem)
            log.step(train_step(state, batch, wait_seconds))
            writer.poll()
            if due(state):
                writer.save(state.step, sharded_state(state.stages, state.optimizer, state.groups))
            if state.is_stopping:
                break
    shutdown_distributed()
    if state.is_stopping:
        log.say(f"stopped by SIGTERM after step {state.step}; the same command goes on from there")
        raise SystemExit(STATUS)


def build(config: RunConfig, device: torch.device) -> TrainState:
    """Returns the state at step 0: base weights and projectors loaded, the stage's parameters trainable."""
    found = base_model_config(config.init.base)
    if differing := differences(config.model, found):
        raise ValueError(
            f"{config.init.base}: not the model of this run: {'; '.join(differing)}; fix `model:` or init.base"
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    sets = open_shards(config)
    table = computed_once(lambda: load_table(config, sets, Console(stderr=True)))
    reader = Reader(groups.dp.rank(), groups.dp.size(), groups.mp.rank(), groups.mp.size())
    source = build_source(config, sets, table, reader)
    stages = build_stages(config, groups)
    for stage in stages:
        initial_parameters(config, stage, groups.tp)
        freeze(stage, config.stage)
        stage.to(device)
    wrapped = wrap(stages, groups)
    return TrainState(
        config=config,
        device=device,
        groups=groups,
        stages=stages,
        wrapped=wrapped,
        optimizer=build_optimizer(wrapped, config, groups),
        tower=load_vision_tower(config.init.base, config.compute.dtype, device),
        source=source,
        run=describe_run(config, [shards.fingerprint for shards in sets], source.num_steps),
    )


def build_stages(config: RunConfig, groups: ProcessGroupCollection) -> list[SaisaModel]:
    """Returns this process's stages of the pipeline, without weights."""
    if config.compute.precision == "fp8":
        check_fp8(config.compute.fp8_recipe)
    parallel = config.parallel
    counts = parallel.layers_per_stage or split_layers(1.0, 0.0, 0.0, config.model.num_layers, parallel.num_stages)
    transformer = build_transformer_config(config.model, config.compute, parallel, config.shared_projector)
    return [
        SaisaModel(config.model, transformer, groups, stage, config.shared_projector, config.compute.attention)
        for stage in stages_of_rank(counts, groups.pp.rank(), parallel.pp)
    ]


def restore(state: TrainState) -> None:
    """Takes up the run where its checkpoints say, if it has any.

    Raises:
        ValueError: The checkpoint is damaged or of another run, or there is none before it.
    """
    config = state.config
    checkpoint = checkpoint_to_resume(config.run_dir, config.checkpoint.resume)
    if checkpoint is None:
        return
    state.step = restore_checkpoint(checkpoint, state.run, state.stages, state.optimizer, state.groups)
    if _is_first_rank():
        for folder in set_aside_newer(checkpoint):
            print(f"renamed to {folder}: this run goes on from {checkpoint.name}", flush=True)


def due(state: TrainState) -> bool:
    """Whether the step that has just ended is one to save after."""
    is_last = state.step == state.source.num_steps
    return state.step % state.config.checkpoint.save_every_steps == 0 or is_last or state.is_stopping


def train_step(state: TrainState, batch: GlobalBatch, wait_seconds: float) -> StepMetrics:
    """Runs one optimizer step over a global batch and returns what it measured.

    Once any process has been told to stop, `state.is_stopping` is set on all.

    Raises:
        ValueError: the loss is not finite; the optimizer has not stepped, and the last checkpoint is sound.
    """
    started = time.monotonic()
    config = state.config
    if not batch.counts.num_targets:
        raise ValueError(
            f"step {batch.step}: none of its {batch.counts.num_samples} samples has a target and "
            f"{batch.counts.num_skipped} were skipped; does data.template={config.data.template} fit these shards?"
        )
    rate = learning_rate(batch.step, state.source.num_steps, config.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    inputs = model_inputs(state, batch)
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(inputs) for _ in state.wrapped],
        model=[*state.wrapped],
        num_microbatches=len(inputs),
        seq_length=config.data.max_text_tokens_per_pack,
        micro_batch_size=1,
    )
    total, state.is_stopping = sum_over_replicas(sums, state)
    loss = total / batch.counts.num_targets
    if not math.isfinite(loss):
        raise ValueError(
            f"step {batch.step}: the loss is {loss}; stopped before the optimizer step. "
            f"Lower optim.learning_rate={config.optim.learning_rate:g} or look at the samples of this step"
        )
    _, grad_norm, _ = cast(tuple[bool, float | None, int | None], state.optimizer.step())
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise ValueError(
            f"step {batch.step}: the gradient norm is {grad_norm}; the last checkpoint is sound, restart from it"
        )
    state.step = batch.step + 1
    seconds = time.monotonic() - started + wait_seconds
    return StepMetrics(
        step=state.step,
        epoch=batch.epoch,
        loss=loss,
        grad_norm=float(grad_norm or 0.0),
        learning_rate=rate,
        step_seconds=seconds,
        data_wait_fraction=wait_seconds / seconds,
        counts=batch.counts,
    )


def model_inputs(state: TrainState, batch: GlobalBatch) -> list[tuple[Pack, Tensor]]:
    """Returns every micro-batch's pack and visual features [I, C], on this process's device."""

    def encode(pixels_B3HW: Tensor) -> Tensor:
        pixels = state.source.image_processor.normalize(pixels_B3HW.to(state.device, non_blocking=True))
        return state.tower(pixels.to(state.config.compute.dtype))

    packs = [micro_batch.pack for micro_batch in batch.micro_batches]
    share_B3HW = torch.cat([micro_batch.pixels_B3HW for micro_batch in batch.micro_batches])
    counts = [pack.num_images for pack in packs]
    vision = state.config.model.vision
    features_BPC = torch.zeros(0, vision.num_tokens, vision.hidden_size, dtype=state.config.compute.dtype)
    if sum(counts):
        window = state.config.train.image_batch_size
        features_BPC = encode_together(encode, share_B3HW, sum(counts), window, state.groups.mp)
    return [
        (pack.to(state.device), rows_of_pack(part.to(state.device), pack.num_visual_padding))
        for pack, part in zip(packs, features_BPC.split(counts), strict=True)
    ]


def forward_step(inputs: Iterator[tuple[Pack, Tensor]], chunk: torch.nn.Module):
    """Returns what a chunk of the model makes of its next micro-batch, and how the schedule is to sum losses."""
    pack, features_IC = next(inputs)
    return chunk(pack, features_IC), sum_losses


def sum_over_replicas(sums: list[Tensor], state: TrainState) -> tuple[float, bool]:
    """Returns, on every process, the sum of the losses of all replicas and whether any is to stop.

    Only last stages bring losses, the same ones on all their tensor-parallel ranks.
    """
    values = torch.tensor([0.0, state.stop.has_come], dtype=torch.float64, device=state.device)
    if sums and state.groups.tp.rank() == 0:
        values[0] = torch.stack(sums).sum()
    torch.distributed.all_reduce(values)
    total, num_stopping = values.tolist()
    return total, num_stopping > 0


def sum_losses(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss, the number of targets, and the sum to report: the schedule divides over all ranks."""
    total = losses.sum()
    return total, torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), total.detach().clone()


def checkpoint_writer(state: TrainState, log: MetricsLog) -> CheckpointWriter:
    """Returns what writes this run's checkpoints."""
    settings = state.config.checkpoint
    extra = {"config": state.config.model_dump(mode="json"), "code": code_version()}
    return CheckpointWriter(state.config.run_dir, state.run, extra, settings.keep_last, settings.in_background, log.say)


def introduce(state: TrainState, log: MetricsLog) -> None:
    """Says what is about to happen and stores the resolved configuration in the run folder."""
    if _is_first_rank():
        (state.config.run_dir / "config.yaml").write_text(to_yaml(state.config))
    parameters = {name: p for stage in state.stages for name, p in stage.named_parameters()}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    here = " on this process" if state.groups.mp.size() > 1 else ""
    log.say(
        f"{state.config.stage}: training {sum(parameters[name].numel() for name in trained):,} of "
        f"{sum(p.numel() for p in parameters.values()):,} parameters{here} ({len(trained)} tensors, {trained[0]} ... "
        f"{trained[-1]}); the vision encoder is frozen"
    )
    log.say(
        f"{state.source.schedule.num_drawn:,} samples an epoch, {state.source.num_steps:,} steps of "
        f"{state.config.train.global_batch_size} on {state.groups.dp.size()} data-parallel ranks, "
        f"from step {state.step}; run folder {state.config.run_dir}"
    )
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


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, after the file")] = None,
    print_config: Annotated[bool, typer.Option(help="print the resolved configuration and exit")] = False,
) -> None:
    """Trains one stage of SAISA."""
    resolved = load_config(config, overrides or [])
    if print_config:
        sys.stdout.write(to_yaml(resolved))
        return
    train(resolved)


if __name__ == "__main__":
    run(main)
