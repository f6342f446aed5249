"""What the replicas of a model do together: sum their gradients, update a part of the weights each, collect them all.

Summing and collecting go on beside the computing. A bucket of gradients is summed as soon as the backward pass of the
last pack has all of it. New weights are asked for right after the update, the first layers' first; a layer waits for
its own when it runs, and until the first one does, the images of the next step are encoded.
"""

from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from model.backend import overwrite_gradients
from model.parallel import ParallelConfig
from model.saisa import SaisaModel

# Parameters of a bucket, at least and for each replica: the sum of a smaller one is mostly latency.
# Source: megatron-core, DistributedDataParallel.
BUCKET_PARAMETERS, REPLICA_PARAMETERS = 40_000_000, 1_000_000


def wrap(
    stages: list[SaisaModel], groups: ProcessGroupCollection, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Returns the stages with weights and gradients in buffers that the distributed optimizer shares out.

    The weights are still to be loaded: the memory they had is given back first, so that nothing exists twice.
    Only the first stage of a pipeline has several buckets: the others end earlier, and their sums too.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=not parallel.reduce_in_bf16,
        fp8_param_gather=bool(stages[0].config.fp8_param),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather,  # layers wait for weights, `gather_weights` asks for them
    )
    bucket_size = parallel.bucket_parameters or max(BUCKET_PARAMETERS, REPLICA_PARAMETERS * groups.dp_cp.size())
    wrapped = []
    for stage in stages:
        in_buckets = parallel.overlap_grad_reduce and stage.stage.is_first
        size = bucket_size if in_buckets else None
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        for parameter in (parameter for parameter in trained if not is_float8tensor(parameter)):
            parameter.data = parameter.data.new_empty(1).expand_as(parameter)  # of the same shape
        layout = DistributedOptimizer.compute_full_param_layout(trained, size, groups.dp_cp.size(), ddp_config)
        wrapped.append(DistributedDataParallel(stage.config, ddp_config, stage, not in_buckets, groups, layout))
    config, no_sync = cast(Any, stages[0].config), [chunk.no_sync for chunk in wrapped]
    config.finalize_model_grads_func = sum_gradients
    config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # in which all packs but the last run
    return wrapped


def sum_gradients(chunks: list[Module], _: Tensor, **settings: Any) -> None:
    """Sums the gradients of all replicas, for megatron-core's schedules; without a number it divides by nothing."""
    finalize_model_grads(chunks, None, **settings)


def clear_gradients(wrapped: list[DistributedDataParallel]) -> None:
    """Sets all gradients to zero but those that the first pack of the step overwrites, which are nearly all of them."""
    for chunk in wrapped:
        overwritten = {id(weight) for weight in overwrite_gradients(chunk.module)}
        if not overwritten:
            chunk.zero_grad_buffer()
            continue
        for parameter in chunk.params_with_grad:  # and then what `zero_grad_buffer` does besides
            parameter.grad_added_to_main_grad = False
        for bucket in chunk.bucket_groups:
            bucket.reset()
        others = [parameter for parameter in chunk.params_with_grad if id(parameter) not in overwritten]
        torch._foreach_zero_(  # pyright: ignore[reportPrivateImportUsage]
            [parameter.main_grad for parameter in others]
        )


def gather_weights(wrapped: list[DistributedDataParallel]) -> None:
    """Asks all replicas for the weights that they have updated, without a wait; the first layers' come first."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:  # or else the update has collected them already
            for bucket in reversed(chunk.bucket_groups):
                bucket.start_param_sync()
