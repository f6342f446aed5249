"""Trains one stage of SAISA.

    torchrun --nproc-per-node 2 -m pipeline.train --config configs/demo-stage1.yaml train.max_steps=20

The same command continues an interrupted run from its last checkpoint. `train()` is the table of contents.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from model.config import differences
from model.hf.vision_saisa import VisionTower
from model.saisa import SaisaModel
from model.vision import encode_images, load_vision_tower
from pipeline.checkpoint import RunInfo, describe_run, latest_checkpoint, restore_checkpoint, save_checkpoint
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.data import BatchSource, GlobalBatch, MicroBatch, build_source, load_table, open_shards
from pipeline.distributed import computed_once, initialize_distributed, shutdown_distributed
from pipeline.metrics import MetricsLog, StepMetrics
from pipeline.optimizer import DTYPES, build_optimizer, freeze, learning_rate, wrap
from pipeline.start import base_model_config, initial_parameters


@dataclass
class TrainState:
    """Everything a step needs; `step` counts finished optimizer steps."""

    config: RunConfig
    device: torch.device
    groups: ProcessGroupCollection
    model: SaisaModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    tower: VisionTower
    source: BatchSource
    run: RunInfo
    trained: list[str]
    step: int = 0


def train(config: RunConfig) -> None:
    """Runs a stage from its last checkpoint (or from its start) to its end.

    Raises:
        ValueError: the base, the shards or a checkpoint do not fit the configuration, or the loss is not finite.
    """
    device = initialize_distributed()
    state = build(config, device)
    if checkpoint := latest_checkpoint(config.run_dir):
        state.step = restore_checkpoint(checkpoint, state.run, state.model, state.optimizer, state.groups)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with MetricsLog(config.run_dir, config.log, state.step, state.source.num_steps, _is_first_rank()) as log:
        introduce(state, log)
        if state.step == state.source.num_steps:
            log.say("this run is finished; set another run_dir to train again")
        for batch, wait_seconds in timed(state.source.batches(state.step)):
            for problem in batch.problems:
                log.say(problem)
            log.step(train_step(state, batch, wait_seconds))
            if state.step % config.checkpoint.save_every_steps == 0 or state.step == state.source.num_steps:
                folder = save(state)
                log.say(f"saved {folder}")
    shutdown_distributed()


def build(config: RunConfig, device: torch.device) -> TrainState:
    """Returns the state at step 0: base weights and projectors loaded, the stage's parameters trainable."""
    found = base_model_config(config.init.base)
    if differing := differences(config.model, found):
        raise ValueError(
            f"{config.init.base}: not the model of this run: {'; '.join(differing)}; fix `model:` or init.base"
        )
    groups, dtype = ProcessGroupCollection.use_mpu_process_groups(), DTYPES[config.train.precision]
    sets = open_shards(config)
    table = computed_once(lambda: load_table(config, sets, Console(stderr=True)))
    source = build_source(config, sets, table, groups.dp.rank(), groups.dp.size())
    model = SaisaModel(config.model, config.stage == "pretrain", dtype, groups)
    initial_parameters(config, model)
    trained = freeze(model, config.stage)
    model.to(device)
    wrapped = wrap(model, groups)
    return TrainState(
        config=config,
        device=device,
        groups=groups,
        model=model,
        wrapped=wrapped,
        optimizer=build_optimizer(wrapped, config, groups),
        tower=load_vision_tower(config.init.base, dtype, device),
        source=source,
        run=describe_run(config, [shards.fingerprint for shards in sets], source.num_steps),
        trained=trained,
    )


def train_step(state: TrainState, batch: GlobalBatch, wait_seconds: float) -> StepMetrics:
    """Runs one optimizer step over a global batch and returns what it measured.

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
    state.wrapped.zero_grad_buffer()
    state.optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=lambda iterator, model: forward_step(state, next(iterator), model),
        data_iterator=iter(batch.micro_batches),
        model=state.wrapped,
        num_microbatches=len(batch.micro_batches),
        seq_length=config.data.max_text_tokens_per_pack,
        micro_batch_size=1,
        pg_collection=state.groups,
    )
    total = torch.stack(sums).sum()
    torch.distributed.all_reduce(total, group=state.groups.dp_cp)
    loss = total.item() / max(1, batch.counts.num_targets)
    if not torch.isfinite(total):
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


def forward_step(state: TrainState, micro_batch: MicroBatch, model: torch.nn.Module):
    """Returns the losses of a micro-batch's targets and how the schedule is to sum them."""
    pixels = state.source.image_processor.normalize(micro_batch.pixels_B3HW.to(state.device))
    pixels = pixels.to(state.model.config.params_dtype)
    features = encode_images(
        state.tower, pixels, state.config.train.image_batch_size, state.config.model.vision.hidden_size
    )
    return model(micro_batch.pack.to(state.device), features), sum_losses


def sum_losses(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss, the number of targets, and the sum to report: the schedule divides over all ranks."""
    total = losses.sum()
    return total, torch.tensor(losses.numel(), dtype=torch.int, device=losses.device), total.detach().clone()


def save(state: TrainState) -> Path:
    """Writes a checkpoint of the finished steps."""
    extra = {"config": state.config.model_dump(mode="json"), "code": code_version()}
    keep = state.config.checkpoint.keep_last
    return save_checkpoint(
        state.config.run_dir, state.step, state.run, extra, state.model, state.optimizer, state.groups, keep
    )


def introduce(state: TrainState, log: MetricsLog) -> None:
    """Says what is about to happen and stores the resolved configuration in the run folder."""
    if _is_first_rank():
        (state.config.run_dir / "config.yaml").write_text(to_yaml(state.config))
    parameters = dict(state.model.named_parameters())
    trained = sum(parameters[name].numel() for name in state.trained)
    log.say(
        f"{state.config.stage}: training {trained:,} of {sum(p.numel() for p in parameters.values()):,} parameters "
        f"({len(state.trained)} tensors, {state.trained[0]} ... {state.trained[-1]}); the vision encoder is frozen"
    )
    log.say(
        f"{state.source.schedule.num_drawn:,} samples an epoch, {state.source.num_steps:,} steps of "
        f"{state.config.train.global_batch_size} on {state.groups.dp.size()} data-parallel ranks, "
        f"from step {state.step}; run folder {state.config.run_dir}"
    )


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
