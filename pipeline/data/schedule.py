"""The plan of a run: which samples, in which packs, on which rank, at which step.

A pure function of the configuration, the shards, the length table and the number of ranks; no byte of a sample is read.
The global batches do not depend on the number of ranks, the packs do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from model.flops import training_flops
from pipeline.config import RunConfig
from pipeline.data.lengths import LengthTable
from pipeline.data.order import Source, batch_position, order, steps_per_epoch
from pipeline.data.packing import SampleSize, deal_samples, imbalance, pack_samples, padded_rows


@dataclass(frozen=True)
class BatchCounts:
    """What the whole global batch holds, over all ranks.

    `num_skipped` samples could not be encoded; `num_without_targets` of the samples have nothing to learn, as a
    rule since it was cut; `training_flops` are the model's, forward and backward, without the encoder's;
    `imbalance_fraction` is by how much the busiest rank exceeds the mean. `num_bad_samples`
    were left out since an image did not decode; the plan does not know of them.
    """

    num_samples: int
    num_skipped: int
    num_without_targets: int
    num_targets: int
    num_dropped_targets: int
    num_truncated_tokens: int
    num_text_tokens: int
    num_padding_tokens: int
    num_visual_tokens: int
    num_images: int
    training_flops: int
    imbalance_fraction: float
    num_bad_samples: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One global batch: `packs[rank]` lists the packs of a rank, each a list of sample numbers."""

    step: int
    epoch: int
    packs: list[list[list[int]]]
    skipped: list[int]
    counts: BatchCounts


_order = lru_cache(maxsize=2)(order)  # of this epoch and the next


class Schedule:
    """The steps of a run."""

    def __init__(self, config: RunConfig, sources: Sequence[Source], table: LengthTable, num_ranks: int) -> None:
        assert len(table) == sum(sum(source.shard_sizes) for source in sources), "a table of other shards"
        self.config, self.sources, self.table, self.num_ranks = config, tuple(sources), table, num_ranks
        self.num_drawn = sum(source.num_drawn for source in sources)
        self.num_steps = steps_per_epoch(self.num_drawn, config.train.global_batch_size) * config.train.num_epochs
        if config.train.max_steps is not None:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        text, images, targets = (
            table.column(name).astype(np.int64) for name in ("num_text", "num_images", "num_targets")
        )
        visual = images * config.model.num_tokens_per_image
        self.flops = training_flops(config.model, config.phase, text, visual, targets)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns int64[num_drawn], the samples of an epoch in their order."""
        return _order(self.config.train.seed, epoch, self.sources, self.config.data.shards_in_use)

    def samples(self, step: int, num_samples: int | None = None) -> np.ndarray:
        """Returns int64[n], the samples of the global batch of a step, or the `num_samples` that begin with it."""
        epoch, part = batch_position(step, self.num_drawn, self.config.train.global_batch_size)
        return self.epoch_order(epoch)[part if num_samples is None else slice(part.start, part.start + num_samples)]

    def plan(self, step: int) -> StepPlan:
        """Returns the plan of a step, counted from 0."""
        data = self.config.data
        numbers = self.samples(step)
        values = dict(zip(("text", "images", "targets", "dropped", "cut"), self.table.values[numbers].T, strict=True))
        fit = values["text"] > 0
        kept = numbers[fit].tolist()
        sizes = [SampleSize(*size) for size in self.table.values[kept, :2].tolist()]
        flops = self.flops[kept].tolist()
        ranks = deal_samples(flops, self.num_ranks)
        packs = []
        for rank in ranks:
            packed = pack_samples([sizes[i] for i in rank], data.max_text_tokens_per_pack, data.max_images_per_pack)
            packs.append([[rank[i] for i in pack] for pack in packed])
        rows = [sum(sizes[i].num_text for i in pack) for rank in packs for pack in rank]
        counts = BatchCounts(
            num_samples=len(kept),
            num_skipped=len(numbers) - len(kept),
            num_without_targets=int((values["targets"][fit] == 0).sum()),
            num_targets=int(values["targets"].sum()),
            num_dropped_targets=int(values["dropped"].sum()),
            num_truncated_tokens=int(values["cut"].sum()),
            num_text_tokens=sum(rows),
            num_padding_tokens=sum(padded_rows(num_rows, self.config.row_multiple) - num_rows for num_rows in rows),
            num_visual_tokens=int(values["images"].sum()) * self.config.model.num_tokens_per_image,
            num_images=int(values["images"].sum()),
            training_flops=sum(flops),
            imbalance_fraction=imbalance(ranks, flops),
        )
        epoch, _ = batch_position(step, self.num_drawn, self.config.train.global_batch_size)
        numbered = [[[kept[i] for i in pack] for pack in rank] for rank in packs]
        return StepPlan(step, epoch, numbered, numbers[~fit].tolist(), counts)
