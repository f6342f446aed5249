"""How a model is divided over processes: which splits are legal, which layers stand on which stage.

Tensor parallelism (tp) divides every linear layer, sequence parallelism also the rows between them, pipeline
parallelism (pp) the layers. With `chunks_per_rank` = 2 a pipeline of two ranks has four stages, dealt in turn:

    rank 0: layers 0-7 and 16-23        rank 1: layers 8-15 and 24-31

What is left of the processes is data parallel. All of this is decided from the sizes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from pydantic import Field, model_validator

from model.config import ModelConfig, Phase, Section
from model.hf.family_saisa import NUM_HEADS

VOCABULARY_MULTIPLE = 128  # rows of embedding and head, whatever tp is, so that checkpoints fit every topology


class ParallelConfig(Section):
    """How one replica of the model is divided; the remaining processes are data parallel."""

    tp: int = Field(default=1, gt=0, description="processes that share every layer")
    pp: int = Field(default=1, gt=0, description="processes that share the layers out")
    chunks_per_rank: int = Field(default=1, gt=0, description="stages of each pipeline rank; more than 1: interleaved")
    sequence_parallel: bool = Field(default=False, description="divide the rows between the layers over tp as well")
    layers_per_stage: tuple[int, ...] | None = Field(
        default=None, description="layers of each of the pp * chunks_per_rank stages; by default evened out by FLOPs"
    )
    overlap_grad_reduce: bool = Field(
        default=True, description="gradients are summed over the replicas while the backward pass goes on"
    )
    overlap_param_gather: bool = Field(
        default=True, description="new weights are collected from the replicas while the next step begins"
    )
    reduce_in_bf16: bool = Field(
        default=False, description="gradients are kept and summed in bf16, not fp32: half the bytes, and less exact"
    )
    bucket_parameters: int | None = Field(
        default=None, gt=0, description="parameters per sum; by default 40 million, or 1 million a replica if more"
    )

    @property
    def num_stages(self) -> int:
        """Stages a text row passes."""
        return self.pp * self.chunks_per_rank

    @property
    def num_row_parts(self) -> int:
        """Into how many parts the rows between the layers are divided."""
        return self.tp if self.sequence_parallel else 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tp > 1: those processes share the rows")
        if self.chunks_per_rank > 1 and self.pp == 1:
            raise ValueError(f"parallel.chunks_per_rank={self.chunks_per_rank} needs parallel.pp > 1")
        if not self.overlap_grad_reduce and (self.overlap_param_gather or self.bucket_parameters):
            setting = "overlap_param_gather=true" if self.overlap_param_gather else "bucket_parameters"
            raise ValueError(
                f"parallel.{setting} needs the buckets of parallel.overlap_grad_reduce=true; set "
                "parallel.overlap_param_gather=false too, and no parallel.bucket_parameters"
            )
        return self


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline: some layers, at the first the embedding too, at the last the head."""

    number: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        """It takes token ids; the others take text states."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """It gives losses; the others give text states."""
        return self.number == self.num_stages - 1


def padded_vocab_size(model: ModelConfig) -> int:
    """Returns the rows of the embedding and the head: the vocabulary, filled up."""
    return -(-model.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Makes sure that a model can be divided as asked.

    Raises:
        ValueError: It cannot; the message lists what is legal.
    """
    divided = {
        "num_query_groups": model.num_query_groups,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "hidden_size": model.hidden_size,
    }
    if model.cross_attention == "open_flamingo":
        divided["cross_attention=open_flamingo's num_heads"] = NUM_HEADS
        divided["vision.hidden_size"] = model.vision.hidden_size
    legal = [tp for tp in range(1, model.num_query_groups + 1) if not any(size % tp for size in divided.values())]
    legal = [tp for tp in legal if VOCABULARY_MULTIPLE % tp == 0]
    for name, size in divided.items():
        if size % parallel.tp:
            raise ValueError(f"parallel.tp={parallel.tp} must divide model.{name}={size}; use parallel.tp in {legal}")
    if parallel.tp not in legal:
        raise ValueError(f"parallel.tp={parallel.tp} must divide {VOCABULARY_MULTIPLE}; use parallel.tp in {legal}")
    if parallel.num_stages > model.num_layers:
        raise ValueError(
            f"parallel.pp={parallel.pp} times parallel.chunks_per_rank={parallel.chunks_per_rank} makes more stages "
            f"than model.num_layers={model.num_layers}; every stage needs a layer"
        )
    given = parallel.layers_per_stage
    if given is not None and (len(given) != parallel.num_stages or sum(given) != model.num_layers or min(given) < 1):
        raise ValueError(
            f"parallel.layers_per_stage={list(given)} must be {parallel.num_stages} numbers (pp * chunks_per_rank), "
            f"each at least 1, that add up to model.num_layers={model.num_layers}"
        )
    if model.tie_embeddings and parallel.pp > 1:
        raise ValueError(
            f"parallel.pp={parallel.pp}: model.tie_embeddings=true keeps embedding and head in one place; use "
            "parallel.pp=1 and parallel.tp"
        )


def check_projectors(model: ModelConfig, phase: Phase, layers_per_stage: Sequence[int]) -> None:
    """Makes sure that each stage of the pipeline has something to train.

    Raises:
        ValueError: One has not, because layers of a block share the projector of the first, which stage 1 trains alone.
    """
    if phase == "finetune" or model.shares_projector(phase):
        return
    for stage, stop in enumerate(accumulate(layers_per_stage)):
        layers = range(stop - layers_per_stage[stage], stop)
        if not any(model.layers[layer].is_projected for layer in layers):
            raise ValueError(
                f"stage {stage} of the pipeline, layers {layers.start} to {layers.stop - 1}, has no projector, and "
                f"model.pretrain_projectors=own trains nothing else in stage 1: model.block_size={model.block_size}; "
                "use a smaller parallel.pp or other parallel.layers_per_stage"
            )


def split_layers(layer_costs: Sequence[float], last_cost: float, num_stages: int) -> list[int]:
    """Returns the layers of each stage so that the costliest stage costs least.

    The costs are those of each layer and of what only the last stage does. Among equals the split whose stages are most
    even wins, and then the one with fewer layers early.
    """
    num_layers = len(layer_costs)
    upto = [0.0, *accumulate(layer_costs)]
    # best[k]: (cost of the worst stage, sum of squares, counts) of the first stages with k layers in all
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(num_stages):
        after: dict[int, tuple[float, float, list[int]]] = {}
        for used, (worst, squares, counts) in best.items():
            for total in range(used + 1, num_layers - (num_stages - stage - 1) + 1):
                own = upto[total] - upto[used] + (last_cost if stage == num_stages - 1 else 0)
                split = (max(worst, own), squares + own * own, [*counts, total - used])
                if total not in after or split < after[total]:
                    after[total] = split
        best = after
    return best[num_layers][2]


def stages_of_rank(layers_per_stage: Sequence[int], pp_rank: int, pp: int) -> list[Stage]:
    """Returns the stages of a pipeline rank, in the order a text row meets them."""
    ends = list(accumulate(layers_per_stage))
    layers = [range(end - count, end) for end, count in zip(ends, layers_per_stage, strict=True)]
    return [Stage(number, len(layers), layers[number]) for number in range(pp_rank, len(layers), pp)]
