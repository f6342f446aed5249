"""One JSON record to a micro-batch: read, encode, pack, decode.

`BatchSource.batch(step)` is a pure function of (shards, seed, step): every rank encodes the text of the whole global
batch, so all agree on the packs and on the number of targets; each then decodes the images of its own packs only.
"""

import io
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

from model.flops import forward_flops
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.pack import Pack, empty_pack
from pipeline.config import RunConfig
from pipeline.order import batch_position, order, steps_per_epoch
from pipeline.packing import SampleSize, deal, pack_samples
from pipeline.samples import Sample, build_sample
from pipeline.shards import ShardSet
from pipeline.templates import ConversationError, Tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """A pack and the pixels of its images, uint8[num_images, 3, H, W], not yet normalised."""

    pack: Pack
    pixels_B3HW: Tensor


@dataclass(frozen=True)
class BatchCounts:
    """What the whole global batch holds, over all ranks. `num_skipped` samples could not be encoded."""

    num_samples: int
    num_skipped: int
    num_targets: int
    num_dropped_targets: int
    num_truncated_tokens: int
    num_text_tokens: int
    num_visual_tokens: int
    forward_flops: int


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's share of a global batch, the counts of the whole, and a line for each sample that was skipped."""

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    counts: BatchCounts
    problems: list[str]


class BatchSource:
    """The global batches of a run, as one data-parallel rank sees them."""

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        tokenizer: Tokenizer,
        image_processor: SaisaImageProcessor,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.config, self.shards = config, shards
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.rank, self.num_ranks = rank, num_ranks
        self.num_steps = steps_per_epoch(len(shards), config.train.global_batch_size) * config.train.num_epochs
        if config.train.max_steps is not None:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def batch(self, step: int) -> GlobalBatch:
        """Returns the global batch of `step`, counted from 0."""
        data, v = self.config.data, self.config.model.vision.num_tokens
        epoch, part = batch_position(step, len(self.shards), self.config.train.global_batch_size)
        numbers = [int(number) for number in self._order(epoch)[part]]
        samples, kept, problems = [], [], []
        for number in numbers:
            try:
                samples.append(self._encode(number))
                kept.append(number)
            except ConversationError as error:
                problems.append(f"skipped: {error}")
        sizes = [SampleSize(len(s.text_token_ids), len(s.image_positions)) for s in samples]
        flops = [forward_flops(self.config.model, size.num_text, size.num_images * v) for size in sizes]
        packs = pack_samples(sizes, data.max_text_tokens_per_pack, data.max_images_per_pack)
        mine = deal(packs, self.num_ranks, flops.__getitem__)[self.rank]
        micro_batches = [self._micro_batch([(kept[i], samples[i]) for i in pack]) for pack in mine]
        if not micro_batches:
            micro_batches = [MicroBatch(empty_pack(v), self._stack([]))]
        counts = BatchCounts(
            num_samples=len(samples),
            num_skipped=len(problems),
            num_targets=sum(s.num_targets for s in samples),
            num_dropped_targets=sum(s.num_dropped_targets for s in samples),
            num_truncated_tokens=sum(s.num_truncated_tokens for s in samples),
            num_text_tokens=sum(size.num_text for size in sizes),
            num_visual_tokens=sum(size.num_images for size in sizes) * v,
            forward_flops=sum(flops),
        )
        return GlobalBatch(step, epoch, micro_batches, counts, problems)

    def batches(self, first_step: int) -> Iterator[GlobalBatch]:
        """Yields the batches from `first_step` to the end, prepared ahead of need by a thread."""
        ahead = self.config.data.prefetch_steps
        if not ahead:
            yield from map(self.batch, range(first_step, self.num_steps))
            return
        with ThreadPoolExecutor(1, "prefetch") as executor:
            waiting: deque[Future[GlobalBatch]] = deque()
            try:
                for step in range(first_step, self.num_steps):
                    waiting.append(executor.submit(self.batch, step))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                executor.shutdown(cancel_futures=True)

    def _epoch_order(self, epoch: int) -> ndarray:
        return order(self.config.train.seed, epoch, self.shards.shard_sizes)

    def _encode(self, number: int) -> Sample:
        data, v = self.config.data, self.config.model.vision.num_tokens
        return build_sample(self.shards.record(number), data.template, self.tokenizer, v, data.max_positions)

    def _micro_batch(self, members: list[tuple[int, Sample]]) -> MicroBatch:
        images = [image for number, sample in members for image in self._images(number, sample)]
        return MicroBatch(
            build_pack([sample for _, sample in members], self.config.model.vision.num_tokens), self._stack(images)
        )

    def _images(self, number: int, sample: Sample) -> list[Tensor]:
        if not len(sample.image_indices):
            return []
        members = self.shards.members(number)
        stored = json.loads(members["json"])["images"]
        return [self._decode(members[stored[i]["member"]]) for i in sample.image_indices]

    def _decode(self, data: bytes) -> Tensor:
        with Image.open(io.BytesIO(data)) as image:
            return torch.as_tensor(self.image_processor.resize_to_uint8(image))

    def _stack(self, images: list[Tensor]) -> Tensor:
        size = self.config.model.vision.image_size
        return torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def build_pack(samples: list[Sample], num_tokens_per_image: int) -> Pack:
    """Returns the samples in one row, in the given order."""

    def row(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(getattr(sample, name), dtype=torch.long) for sample in samples])

    return Pack(
        token_ids_T=row("text_token_ids"),
        positions_T=row("text_positions"),
        targets_T=row("targets"),
        image_positions=row("image_positions"),
        text_lengths=[len(sample.text_token_ids) for sample in samples],
        image_counts=[len(sample.image_positions) for sample in samples],
        num_tokens_per_image=num_tokens_per_image,
    )
