"""What a training step needs, and how it is built: data, this process's stages of the model, optimizer, encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from common.console import build_console
from model.attention import check_backend, installed_kernels
from model.backend import check_fp8, check_machine
from model.compute import build_transformer_config, compute_dtype
from model.config import differences
from model.flops import stage_costs
from model.parallel import check_projectors, split_layers, stages_of_rank
from model.saisa import SaisaModel
from model.vision import Tower, flops_per_image, fuse_activations, load_vision_tower
from pipeline.checkpoint.run_info import RunInfo, describe_run
from pipeline.config import RunConfig
from pipeline.data.batches import BatchSource, RankCoordinates, build_source, load_table, open_shards
from pipeline.data.lengths import LengthTable
from pipeline.distributed import broadcast_from_rank0
from pipeline.optimizer import build_optimizer, freeze
from pipeline.phases import Phases
from pipeline.profiling import check_profile_steps
from pipeline.replicas import wrap
from pipeline.start import base_model_config, initial_parameters
from pipeline.stop import STOP_FILE, StopRequest


@dataclass
class TrainState:
    """Everything a step needs; `step` counts finished optimizer steps."""

    config: RunConfig
    device: torch.device
    groups: ProcessGroupCollection
    stages: list[SaisaModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    tower: Tower
    flops_per_image: int
    source: BatchSource
    run: RunInfo
    stop: StopRequest
    phases: Phases
    step: int = 0
    is_stopping: bool = False
    is_writing: bool = False  # this process still writes a checkpoint, in the background
    is_any_writing: bool = False  # any process did, in the step before
    bad_samples: dict[int, str] = field(default_factory=dict)
    own_seconds: float = 0.0  # of the step before, until it waited for others


def build(config: RunConfig, device: torch.device) -> TrainState:
    """Returns the state at step 0: base weights and projectors loaded, the stage's parameters trainable.

    Raises:
        ValueError: The base, the shards or the machine do not fit the configuration.
    """
    check_machine()
    check_kernels(config, device)
    found = base_model_config(config.init.base)
    if differing := differences(config.model, found, has_projectors=config.init.projector == "base"):
        raise ValueError(
            f"{config.init.base}: not the model of this run: {'; '.join(differing)}; fix `model:` or init.base"
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    sets = open_shards(config)
    table = broadcast_from_rank0(lambda: load_table(config, sets, build_console(stderr=True)))
    coordinates = RankCoordinates(groups.dp.rank(), groups.dp.size(), groups.mp.rank(), groups.mp.size())
    source = build_source(config, sets, table, coordinates)
    check_profile_steps(config.log.profile_steps, source.num_steps)
    stages = build_stages(config, groups, layers_per_stage(config, table), device)
    wrapped = make_trainable(config, stages, groups)
    for stage in stages:
        initial_parameters(config, stage, groups.tp)
    return assemble(
        config,
        device,
        groups,
        stages,
        wrapped,
        tower=load_vision_tower(config.init.base, compute_dtype(config.compute), device),
        flops_per_image=flops_per_image(config.init.base, config.model.vision),
        source=source,
        run=describe_run(config, [shards.fingerprint for shards in sets], source.num_steps),
    )


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Makes sure that this machine has what a run computes with.

    Raises:
        ValueError: It has not; the message names the setting.
    """
    if config.log.nvtx and device.type != "cuda":
        raise ValueError("log.nvtx=true names ranges for a GPU's profiler, and there is no GPU; use log.profile_steps")
    if config.compute.precision == "fp8":
        check_fp8(config.compute.fp8_recipe)
    if config.compute.attention != "auto":
        kernels, head_dim = installed_kernels(), config.model.head_dim
        check_backend(config.compute.attention, device.type, compute_dtype(config.compute), head_dim, kernels)


def assemble(
    config: RunConfig,
    device: torch.device,
    groups: ProcessGroupCollection,
    stages: list[SaisaModel],
    wrapped: list[DistributedDataParallel],
    tower: Tower,
    flops_per_image: int,
    source: BatchSource,
    run: RunInfo,
) -> TrainState:
    """Returns the state at step 0 around stages that are trainable and have their weights."""
    fuse_activations(tower, config.compute)
    phases, schedule = Phases(device, config.log.nvtx), wrapped[0].config  # which all chunks share
    assert schedule.finalize_model_grads_func is not None
    schedule.finalize_model_grads_func = phases.around("reduce", schedule.finalize_model_grads_func)
    return TrainState(
        config=config,
        device=device,
        groups=groups,
        stages=stages,
        wrapped=wrapped,
        phases=phases,
        optimizer=build_optimizer(wrapped, config),
        tower=tower,
        flops_per_image=flops_per_image,
        source=source,
        run=run,
        stop=StopRequest(config.run_dir / STOP_FILE if torch.distributed.get_rank() == 0 else None),
    )


def layers_per_stage(config: RunConfig, table: LengthTable) -> Sequence[int]:
    """Returns the layers of each pipeline stage: as configured, or evened out for the mean sample of the run.

    The embedding is a lookup and costs nothing here; the encoder is shared out on its own.
    """
    parallel, model = config.parallel, config.model
    if parallel.layers_per_stage is not None:
        return parallel.layers_per_stage
    text, images, targets = (round(table.column(n).mean()) for n in ("num_text", "num_images", "num_targets"))
    layers, head = stage_costs(model, config.phase, text, images * model.num_tokens_per_image, targets)
    return split_layers(layers, head, parallel.num_stages)


def build_stages(
    config: RunConfig, groups: ProcessGroupCollection, num_layers: Sequence[int], device: torch.device
) -> list[SaisaModel]:
    """Returns this process's stages of the pipeline on its device, without weights."""
    parallel, shared = config.parallel, config.shared_projector
    check_projectors(config.model, config.phase, num_layers)
    transformer = build_transformer_config(config.model, config.compute, parallel, shared)
    with device:
        return [
            SaisaModel(config.model, transformer, groups, stage, shared, config.compute.attention)
            for stage in stages_of_rank(num_layers, groups.pp.rank(), parallel.pp)
        ]


def make_trainable(
    config: RunConfig, stages: list[SaisaModel], groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Returns the stages with what the phase trains in buffers, without its weights, and the rest frozen."""
    for stage in stages:
        freeze(stage, config.phase)
    return wrap(stages, groups, config.parallel)
