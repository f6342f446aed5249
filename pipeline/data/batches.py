"""One JSON record to a micro-batch: read, encode, decode, pack.

The schedule says which samples a data-parallel rank gets at a step; this file reads those and no others. Where several
processes share one replica of the model, each reads all its samples but decodes only its share of the images, in turn.
A batch is a function of its step alone, so worker processes prepare steps in any order and the run is the same with any
number of them.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from traceback import clear_frames
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.console import count_text
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf_read import load_tokenizer
from model.pack import IGNORE_INDEX, Pack
from pipeline.config import RunConfig
from pipeline.data.images import decode_image
from pipeline.data.lengths import Encoding, LengthTable, join, length_table
from pipeline.data.order import Source, shard_sequence
from pipeline.data.packing import padded_rows
from pipeline.data.samples import Sample, build_sample
from pipeline.data.schedule import BatchCounts, Schedule
from pipeline.data.templates import Tokenizer
from pipeline.distributed import init_worker_signals, worker_context
from pipeline.start import load_image_processor

if TYPE_CHECKING:  # the readers of shards, and streaming with them, are for whoever opens some
    from pipeline.shards.shard_set import ShardSet


@dataclass(frozen=True)
class MicroBatch:
    """A pack, the numbers of its samples, and this process's share of its images: uint8[n, 3, H, W], not normalised."""

    pack: Pack
    numbers: list[int]
    pixels_B3HW: Tensor


class RankCoordinates(NamedTuple):
    """Where a process stands: its data-parallel rank, and its rank among those that share one replica (tp x pp)."""

    dp_rank: int
    dp_size: int
    mp_rank: int = 0
    mp_size: int = 1


class StoredImage(NamedTuple):
    """The bytes of an image, its name for people, and the number of its sample."""

    data: bytes
    name: str
    sample: int


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's share of a global batch, the counts of the whole, and a line for each sample that was skipped.

    `bad_samples`: of those whose images this process decodes, which have one that does not decode, and why.
    """

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    counts: BatchCounts
    problems: list[str]
    bad_samples: dict[int, str]

    def pin_memory(self) -> Self:
        """Moves the pixels to memory that a GPU copies from while it computes; the DataLoader calls this."""
        for micro_batch in self.micro_batches:
            object.__setattr__(micro_batch, "pixels_B3HW", micro_batch.pixels_B3HW.pin_memory())
        return self


class Mixture:
    """The samples of several shard sets, numbered through."""

    def __init__(self, sets: "Sequence[ShardSet]") -> None:
        self.sets = list(sets)
        self._ends = list(accumulate(len(shards) for shards in sets))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, number: int) -> "tuple[ShardSet, int]":
        """Returns the shard set of a sample and its number there."""
        part = bisect_right(self._ends, number)
        return self.sets[part], number - (self._ends[part] - len(self.sets[part]))

    def prefetch(self, numbers: np.ndarray) -> None:
        """Lets the shards of samples that will be read soon, int64[n], be downloaded in the order of first need."""
        for shards, end in zip(self.sets, self._ends, strict=True):
            local = numbers - (end - len(shards))
            mine = local[(local >= 0) & (local < len(shards))]
            starts = np.cumsum([0, *shards.shard_sizes])[:-1]
            shards.prefetch(list(shard_sequence(mine, starts)))


class BatchSource(Dataset[GlobalBatch]):
    """The global batches of a run, as one process sees them: item `step` is its share of that step."""

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        samples: Mixture,
        tokenizer: Tokenizer,
        image_processor: SaisaImageProcessor,
        coordinates: RankCoordinates,
    ) -> None:
        self.config, self.schedule, self.samples = config, schedule, samples
        self.tokenizer, self.image_processor, self.coordinates = tokenizer, image_processor, coordinates
        self.num_steps = schedule.num_steps
        samples_per_shard = -(-len(samples) // sum(len(shards.shard_sizes) for shards in samples.sets))
        self.num_ahead = 2 * config.data.shards_in_use * samples_per_shard  # what is mixed now, and next

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> GlobalBatch:
        """Returns this process's share of the global batch of `step`, counted from 0."""
        plan, parallel = self.schedule.plan(step), self.config.parallel
        self.samples.prefetch(self.schedule.samples(step, self.num_ahead))
        packs = list(plan.packs[self.coordinates.dp_rank])
        # Without a pack the other ranks would wait for ever; an interleaved pipeline wants a multiple of its length.
        packs += [[]] * (padded_rows(len(packs), parallel.pp if parallel.chunks_per_rank > 1 else 1) - len(packs))
        micro_batches: list[MicroBatch] = []
        bad_samples: dict[int, str] = {}
        for pack in packs:
            num_before = sum(micro_batch.pack.num_images for micro_batch in micro_batches)
            micro_batches.append(self._micro_batch(pack, num_before, bad_samples))
        problems = [f"skipped: {self.schedule.table.problems[number]}" for number in plan.skipped]
        return GlobalBatch(step, plan.epoch, micro_batches, plan.counts, problems, bad_samples)

    def remarks(self) -> list[str]:
        """Returns a line for each kind of sample that the run will not learn from, with their number and the first."""
        table, lines = self.schedule.table, []
        if table.problems:
            first = table.problems[min(table.problems)]
            lines.append(
                f"{len(table.problems):,} of {count_text(len(table), 'sample')} cannot be encoded and will be "
                f"skipped: {first}"
            )
        if len(idle := table.without_targets()):
            num_cut = int((table.column("num_truncated_tokens")[idle] > 0).sum())
            cut = (
                f", {num_cut:,} since data.max_positions={self.config.data.max_positions} cuts them" if num_cut else ""
            )
            shards, local = self.samples.locate(int(idle[0]))
            record = shards.record(local)
            lines.append(
                f"{len(idle):,} of {count_text(len(table), 'sample')} will teach nothing{cut}; the first is "
                f"record {record['id']} (index {record['source_index']}) of {shards.location}"
            )
        return lines

    def batches(self, first_step: int) -> Iterator[GlobalBatch]:
        """Yields the batches from `first_step` to the end, prepared ahead of need by worker processes or a thread."""
        data, steps = self.config.data, range(first_step, self.num_steps)
        if not data.num_workers:
            yield from self._read_ahead(steps)
            return
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=data.num_workers,
            prefetch_factor=max(1, data.prefetch_steps),
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=worker_context(),
            worker_init_fn=init_worker_signals,
        )
        try:
            yield from loader
        except Exception as error:
            clear_frames(error.__traceback__)  # which hold the workers; left to the garbage, they take 5 seconds to end
            raise

    def _read_ahead(self, steps: range) -> Iterator[GlobalBatch]:
        ahead = self.config.data.prefetch_steps
        with ThreadPoolExecutor(1, "prefetch") as executor:
            waiting: deque[Future[GlobalBatch]] = deque()
            try:
                for step in steps:
                    waiting.append(executor.submit(self.__getitem__, step))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                executor.shutdown(cancel_futures=True)

    def _micro_batch(self, numbers: list[int], num_images_before: int, bad_samples: dict[int, str]) -> MicroBatch:
        samples: list[Sample] = []
        images: list[StoredImage] = []
        for number in numbers:
            sample, stored = self._read(number)
            samples.append(sample)
            images += stored
        v, size = self.config.model.num_tokens_per_image, self.config.model.vision.image_size
        first = (self.coordinates.mp_rank - num_images_before) % self.coordinates.mp_size
        pixels = [self._decode(image, bad_samples) for image in images[first :: self.coordinates.mp_size]]
        return MicroBatch(
            build_pack(samples, v, self.config.row_multiple),
            numbers,
            torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        )

    def _read(self, number: int) -> tuple[Sample, list[StoredImage]]:
        """Returns a sample and the images it keeps."""
        shards, local = self.samples.locate(number)
        (record, members), data = shards.sample(local), self.config.data
        v = self.config.model.num_tokens_per_image
        name = f"{shards.location}: record {record['id']} (index {record['source_index']})"
        sample = build_sample(record, data.template, self.tokenizer, v, data.max_positions, data.special_tokens)
        try:
            self.schedule.table.check(number, sample, name)
        except ValueError as error:
            raise ValueError(f"{error}; delete lengths-*.npz in data.cache={data.cache}") from None
        kept = [record["images"][i] for i in sample.image_indices]
        return sample, [
            StoredImage(members[image["member"]], f"{name}, image {image['path']}", number) for image in kept
        ]

    def _decode(self, image: StoredImage, bad_samples: dict[int, str]) -> Tensor:
        """Returns the pixels of an image; black ones for a bad one, if the run may leave out samples."""
        try:
            return decode_image(image.data, self.image_processor, self.config.data.exact_images)
        except ValueError as error:
            problem = f"{image.name} does not decode: {error}"
            if not self.config.data.max_bad_samples:
                raise ValueError(f"{problem}; data.max_bad_samples=1 and more train on without such samples") from None
            bad_samples[image.sample] = problem
            size = self.config.model.vision.image_size
            return torch.zeros(3, size, size, dtype=torch.uint8)


def open_shards(config: RunConfig) -> "list[ShardSet]":
    """Returns the shard sets of a run.

    Raises:
        ValueError: One is not there, unfinished or damaged.
    """
    from pipeline.shards.shard_set import ShardSet

    data = config.data
    sets = [ShardSet(source.location, data.cache, data.cache_limit) for source in data.shards]
    largest = max(
        (reader.raw_data.bytes for shards in sets for reader in shards.readers if "://" in shards.location), default=0
    )
    if data.cache_limit is not None and data.cache_limit < largest * data.shards_in_use:
        raise ValueError(
            f"data.cache_limit={data.cache_limit:,} holds fewer shards than "
            f"data.shards_in_use={data.shards_in_use}: they have up to {largest:,} bytes and would be fetched again "
            "and again; raise the limit or mix fewer"
        )
    return sets


def load_table(config: RunConfig, sets: "Sequence[ShardSet]", console: Console) -> LengthTable:
    """Returns the lengths of all samples of a run, computing what no earlier run has left in the cache."""
    data = config.data
    v = config.model.num_tokens_per_image
    encoding = Encoding(config.init.base, data.template, v, data.max_positions, data.special_tokens)
    return join([length_table(shards, encoding, data.cache, console) for shards in sets])


def build_source(
    config: RunConfig, sets: "Sequence[ShardSet]", table: LengthTable, coordinates: RankCoordinates
) -> BatchSource:
    """Returns the batches of a run as one process sees them."""
    sources = [Source(tuple(s.shard_sizes), part.repeat) for s, part in zip(sets, config.data.shards, strict=True)]
    return BatchSource(
        config,
        Schedule(config, sources, table, coordinates.dp_size),
        Mixture(sets),
        load_tokenizer(config.init.base),
        load_image_processor(config.init.base, config.data.image_aspect_ratio),
        coordinates,
    )


def build_pack(samples: list[Sample], num_tokens_per_image: int, row_multiple: int = 1) -> Pack:
    """Returns the samples in one row, in the given order.

    Text and visual rows are each filled up to a multiple of `row_multiple`, by a last sample without targets that no
    other sample sees: kernels for 8-bit numbers and sequence parallelism want that. A pack of no samples is one such
    sample: work for a process that has none, so that all stay in step.
    """

    def row(name: str, fill: list[int]) -> Tensor:
        values = [torch.as_tensor(getattr(sample, name), dtype=torch.long) for sample in samples]
        return torch.cat([*values, torch.tensor(fill, dtype=torch.long)])

    lengths = [len(sample.text_token_ids) for sample in samples]
    num_padding = padded_rows(sum(lengths), row_multiple) - sum(lengths)
    num_visual = num_tokens_per_image * sum(len(sample.image_positions) for sample in samples)
    num_visual_padding = padded_rows(num_visual, row_multiple) - num_visual if row_multiple > 1 else 0
    padding = [num_padding] if num_padding or num_visual_padding else []
    return Pack(
        token_ids_T=row("text_token_ids", [0] * num_padding),
        positions_T=row("text_positions", list(range(num_padding))),
        targets_T=row("targets", [IGNORE_INDEX] * num_padding),
        image_positions=row("image_positions", []),
        text_lengths=lengths + padding,
        image_counts=[len(sample.image_positions) for sample in samples] + [0] * len(padding),
        num_tokens_per_image=num_tokens_per_image,
        num_visual_padding=num_visual_padding,
    )
