"""Which parameters a phase trains, and how: one explicit place for both.

| phase    | trained                                   | frozen                            |
|----------|-------------------------------------------|-----------------------------------|
| pretrain | the shared projector, or n projectors     | the language model, the encoder   |
| finetune | n projectors and the language model       | the encoder                       |

`flamingo` trains its blocks, and the resampler or projector in front of them, in both; all else is frozen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.optim import Adam

from model.backend import uses_transformer_engine
from model.compute import DTYPES, compute_dtype
from model.config import Phase
from model.flamingo_weights import new_weights
from model.saisa import SaisaModel
from pipeline.config import OptimConfig, RunConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's Adam and Transformer Engine's call them


def freeze(model: SaisaModel, phase: Phase) -> None:
    """Freezes what a phase of training does not train."""
    trains_all, added = model.model.trains_language_model(phase), {weight.ours for weight in new_weights(model.model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_all or "projector." in name or name in added)


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Returns the rate of optimizer step `step` (from 0): linear warm-up from 0, then half a cosine down to 0.

    Source: SAISA table 8; warm-up steps are rounded up and the first step has rate 0, as in Hugging Face's scheduler.
    """
    num_warmup = math.ceil(num_steps * optim.warmup_fraction)
    if step < num_warmup:
        return optim.learning_rate * step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(wrapped: list[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """Returns AdamW with its states divided over the data-parallel group; the rate is set every step.

    Raises:
        ValueError: Moments in bf16 are asked for where there is no optimizer that keeps them so.
    """
    optim, bf16 = config.optim, compute_dtype(config.compute) == torch.bfloat16
    if optim.moments == "bf16" and not (bf16 and uses_transformer_engine(compute_dtype(config.compute))):
        raise ValueError(
            "optim.moments=bf16 needs a GPU, Transformer Engine (the extra `gpu`) and compute.precision=bf16 or fp8; "
            "use optim.moments=fp32"
        )
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_epsilon,
        clip_grad=optim.clip_grad_norm,
        bf16=bf16,
        params_dtype=compute_dtype(config.compute),
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=optim.moments == "bf16",
        fp8_recipe=config.compute.fp8_recipe if config.compute.fp8_weights else None,
        store_param_remainders=False,  # checkpoints are to have the whole fp32 weight
        exp_avg_dtype=DTYPES[optim.moments],
        exp_avg_sq_dtype=DTYPES[optim.moments],
    )
    optimizer = get_megatron_optimizer(optimizer_config, [*wrapped])
    for part in _parts(optimizer):
        _start_moments(part.optimizer)
    return optimizer


@torch.no_grad()
def clip_gradients(optimizer: MegatronOptimizer) -> Tensor:
    """Returns f32[1], the norm of all gradients before clipping, and leaves them ready for `update_weights`."""
    (part,) = _parts(optimizer)  # a model without experts has one
    part.prepare_grads()
    norm = part.clip_grad_norm(part.config.clip_grad)  # on the device with Transformer Engine, a number without
    return norm if isinstance(norm, Tensor) else torch.tensor([norm])


def update_weights(optimizer: MegatronOptimizer) -> None:
    """Updates the weights by the gradients that `clip_gradients` left, and lets go of these."""
    (part,) = _parts(optimizer)
    part.step_with_ready_grads()
    part.zero_grad()


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, stop) of a flattened parameter, which this process updates.

    Attributes:
        states: flat tensors of the optimizer itself: `param` (fp32 weights), `exp_avg` and `exp_avg_sq`.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    states: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """The model's weight, flat; what the model holds in 8 bits as it was before it was rounded to them."""
        if is_float8tensor(self.parameter):
            return self.states["param"].to(self.parameter.dtype)
        return self.parameter.detach().view(-1)[self.start : self.stop]


def owned_ranges(optimizer: MegatronOptimizer) -> Iterator[OwnedRange]:
    """Yields what this process updates; together the data-parallel ranks own every element once."""
    for part in _parts(optimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            where = part._get_model_param_range_map(parameter)["param"]
            weights = part.optimizer.param_groups[group]["params"][place]
            state = part.optimizer.state[weights]
            states = {"param": state.get("master_param", weights)} | {name: state[name] for name in MOMENTS}
            assert states["param"].dtype == torch.float32
            yield OwnedRange(
                parameter, where.start, where.end, {name: tensor.detach() for name, tensor in states.items()}
            )


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Returns how often the weights have been updated, by which Adam corrects its moments."""
    counts = [0]
    for part in _parts(optimizer):
        holders = part.optimizer.state.values() if _is_torchs(part.optimizer) else part.optimizer.param_groups
        counts += [int(holder.get("step", 0)) for holder in holders]
    return max(counts)


def set_num_updates(optimizer: MegatronOptimizer, count: int) -> None:
    """Lets the optimizer go on as after `count` updates."""
    for part in _parts(optimizer):
        if _is_torchs(part.optimizer):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(count))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = count


def _start_moments(adam: Any) -> None:
    """Makes what an Adam makes in its first step, so that it can be saved and loaded at any time."""
    for parameter in chain.from_iterable(group["params"] for group in adam.param_groups):
        if _is_torchs(adam):
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        else:
            adam.initialize_state(parameter, store_param_remainders=False)


def _is_torchs(adam: Any) -> bool:
    """Whether it is torch's Adam, which counts its steps for each parameter, or Transformer Engine's."""
    return isinstance(adam, Adam)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
