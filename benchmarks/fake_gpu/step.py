"""A whole training step of a recipe on a fake GPU: everything but values, in seconds, at any number of processes.

This process is one rank of a world; the others are torch's `fake` process group, whose collectives end at once. The
code is the one that trains: layers, DDP, optimizer and `train_step`; the weights and the batch are made up. The process
must have its fake GPU before it imports this: `benchmarks.fake_gpu.traces.trace_all` sees to that.
"""

import gc
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CLIPVisionConfig, SiglipVisionConfig

from benchmarks.fake_gpu import attention, te
from benchmarks.fake_gpu.recorder import Recorder
from benchmarks.fake_gpu.runtime import FakeTensors
from benchmarks.fake_gpu.traces import Case, Load, Trace
from model.compute import compute_dtype
from model.flops import stage_costs
from model.fp8_state import FP8_STATE, fp8_state_checked, has_fp8_state
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf.vision_saisa import VisionTower
from model.pack import IGNORE_INDEX, Pack
from model.parallel import split_layers
from pipeline.checkpoint.checkpoint import sharded_state
from pipeline.config import RunConfig, load_config
from pipeline.data.batches import GlobalBatch, MicroBatch
from pipeline.data.batches import build_pack as pack_samples
from pipeline.data.samples import Sample
from pipeline.data.schedule import BatchCounts
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.optimizer import owned_ranges, set_num_updates
from pipeline.state import TrainState, assemble, build_stages, check_kernels, make_trainable
from pipeline.step import train_step


def trace(case: Case, recorder: Recorder) -> Trace:
    """Returns the second step of a run (in the first, buffers are made that stay)."""
    recorder.clear()
    join_fake_world(case.world_size, case.rank)
    try:
        return trace_step(load_config(case.config, [*case.overrides]), case.load, recorder, case.is_resumed)
    finally:
        shutdown_distributed()
        te.forget()
        gc.collect()


def trace_step(config: RunConfig, load: Load, recorder: Recorder, is_resumed: bool = False) -> Trace:
    """Returns the trace of a step, in a process that has joined its world."""
    packs = [build_pack(load, config.model.num_tokens_per_image, config.row_multiple) for _ in range(load.num_packs)]
    for pack in packs:
        attention.install(recorder, pack)
    recorder.num_true = packs[0].num_targets
    with FakeTensors(allow_non_fake_inputs=True), recorder:
        state = build_state(config, load)
        start_bytes = recorder.peak_bytes
        if is_resumed:
            load_own_state(state)
        for step in range(2):
            recorder.restart()
            resident_bytes = recorder.live_bytes
            train_step(state, build_batch(step, packs, state), wait_seconds=0.0)
        seen = [*recorder.events], start_bytes, resident_bytes, recorder.peak_bytes, recorder.peak_at
        tensors = [
            tensor for owned in owned_ranges(state.optimizer) for tensor in (owned.weight, *owned.states.values())
        ]
    return Trace(*seen, saved_bytes=sum(tensor.nbytes for tensor in tensors))


def load_own_state(state: TrainState) -> None:
    """Loads what a checkpoint of this process would hold of weights and optimizer, as `restore_checkpoint` does."""
    stored = sharded_state(state.stages, state.optimizer, state.groups, is_loading=True)
    force_all_tensors_to_non_fp8(stored)  # as dist_checkpointing.load does first
    for entry in stored["optimizer"]["owned"].values():  # data are views of what the optimizer and the model have
        entry.data.copy_(entry.data.clone())
    for number, stage in enumerate(state.stages):
        own = stored[f"stage{number}"]
        weights = {name: entry.data.clone() for name, entry in own.items() if not name.endswith(FP8_STATE)}
        stage.load_state_dict(weights, strict=False)
        if has_fp8_state(stage.config):
            names = [f"{name}.{FP8_STATE}" for name, module in stage.named_modules() if hasattr(module, "fp8_meta")]
            assert own.keys() >= {*names}, "scales that no checkpoint has"
            scales = dict.fromkeys(names, delayed_scales(stage.config))
            with fp8_state_checked(scales):
                stage.load_state_dict(scales, strict=False)
    set_num_updates(state.optimizer, stored["optimizer"]["step"])


def delayed_scales(config: TransformerConfig) -> Tensor:
    """Returns what a checkpoint holds of FP8's delayed recipe for a linear layer, as Transformer Engine writes it."""
    recipe, length = get_fp8_recipe(config), config.fp8_amax_history_len
    with unset_fake_temporarily():  # a pickle has values
        scales = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(length, 3)}  # input, weight, output
        scales |= {"scale_bwd": torch.ones(2), "amax_history_bwd": torch.zeros(length, 2)}  # gradients: output, input
        extra = {"num_gemms": 1, "fp8_checkpoint": True}
        written = pickle.dumps({"recipe": recipe, **scales, "extra_fp8_variables": extra})
        return torch.frombuffer(bytearray(written), dtype=torch.uint8).as_subclass(_WithValues)


class _WithValues(Tensor):
    """A tensor of the host that has values beside fake ones, for what reads them as an array."""

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        with unset_fake_temporarily():
            return self.as_subclass(Tensor).numpy()


def join_fake_world(world_size: int, rank: int) -> None:
    """Makes this process one of many that are not there."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    distributed: Any = torch.distributed
    if not isinstance(distributed.new_group, partial):
        distributed.new_group = partial(_fake_group, distributed.new_group)
    distributed.all_gather_object = _gather_own
    distributed.broadcast_object_list = lambda *_, **__: None


def _fake_group(new_group: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return new_group(*args, **{**kwargs, "backend": "fake", "pg_options": None})


def _gather_own(boxes: list[Any], value: Any, group: Any = None) -> None:
    boxes[:] = [value] * len(boxes)


def build_state(config: RunConfig, load: Load) -> TrainState:
    """Returns the state at step 0, as `pipeline.state.build` does from a base and shards."""
    device, parallel = initialize_distributed(config.parallel), config.parallel
    check_kernels(config, device)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    sizes = (load.num_text, load.num_images * config.model.num_tokens_per_image, load.num_targets)
    layers, head = stage_costs(config.model, config.phase, *sizes)
    num_layers = parallel.layers_per_stage or split_layers(layers, head, parallel.num_stages)
    stages = build_stages(config, groups, num_layers, device)
    source = SimpleNamespace(num_steps=100, image_processor=SaisaImageProcessor(do_rescale=True))
    made_up: dict[str, Any] = {"flops_per_image": 0, "source": source, "run": None}
    wrapped = make_trainable(config, stages, groups)
    return assemble(config, device, groups, stages, wrapped, build_tower(config, device), **made_up)


def build_tower(config: RunConfig, device: torch.device) -> VisionTower:
    """Returns an encoder of the recipe's sizes, without weights."""
    vision = config.model.vision
    ffn_hidden_size = vision.usual_ffn_hidden_size  # refuses timm's, which have no sizes of their own
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision.type]
    described = kind(
        hidden_size=vision.hidden_size,
        intermediate_size=ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.hidden_size // 64,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(config.compute))  # fake tensors cannot be converted in place
    try:
        with device:
            return VisionTower(described, vision.select_layer)
    finally:
        torch.set_default_dtype(before)


def build_pack(load: Load, num_tokens: int, row_multiple: int) -> Pack:
    """Returns a pack of equal samples, filled up as a run's are; images stand behind a quarter of a sample's text."""
    starts = load.num_text // 4 + np.arange(load.num_images) * (num_tokens + 1)
    length = load.num_text + load.num_images * num_tokens
    targets = np.full(load.num_text, IGNORE_INDEX)
    targets[load.num_text - load.num_targets :] = 0
    sample = Sample(
        text_token_ids=np.zeros(load.num_text, dtype=np.int64),
        text_positions=np.setdiff1d(np.arange(length), starts[:, None] + np.arange(num_tokens)),
        targets=targets,
        image_positions=starts,
        image_indices=np.arange(load.num_images),
        num_targets=load.num_targets,
        num_dropped_targets=0,
        num_truncated_tokens=0,
    )
    pack = pack_samples([sample] * load.num_samples, num_tokens, row_multiple)
    assert pack.num_targets == load.num_samples * load.num_targets
    return pack


def build_batch(step: int, packs: Sequence[Pack], state: TrainState) -> GlobalBatch:
    """Returns this process's share of a global batch that gives every data-parallel rank the same packs."""
    size, rank, edge = state.groups.mp.size(), state.groups.mp.rank(), state.config.model.vision.image_size
    micro_batches, num_before = [], 0
    for pack in packs:
        num_own = len(range((rank - num_before) % size, pack.num_images, size))
        micro_batches.append(MicroBatch(pack, [], torch.zeros(num_own, 3, edge, edge, dtype=torch.uint8)))
        num_before += pack.num_images
    num_ranks = state.groups.dp.size()
    counts = BatchCounts(
        num_samples=num_ranks * sum(len(pack.text_lengths) for pack in packs),
        num_skipped=0,
        num_without_targets=0,
        num_targets=1,  # what the recorder answers for every sum that the host reads
        num_dropped_targets=0,
        num_truncated_tokens=0,
        num_text_tokens=0,
        num_padding_tokens=0,
        num_visual_tokens=0,
        num_images=num_ranks * num_before,
        training_flops=0,
        imbalance_fraction=0.0,
    )
    batch = GlobalBatch(step, 0, micro_batches, counts, [], {})
    return batch.pin_memory() if state.device.type == "cuda" else batch
