"""Which samples make up which global batch: pure functions of the seed, the epoch and the shards.

The order is decided before a byte is read and does not know how many machines will read it, so the same run on one
process or a thousand sees the same batches, and resuming continues with the very next sample.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """One shard set of a mixture: the samples of each shard, and how often an epoch brings each sample.

    `repeat` 2.5 means: every sample twice, and a half of them, another half each epoch, a third time.
    """

    shard_sizes: tuple[int, ...]
    repeat: float = 1.0

    @property
    def num_drawn(self) -> int:
        """Samples that one epoch takes from it."""
        num_samples = sum(self.shard_sizes)
        return int(self.repeat) * num_samples + round(self.repeat % 1 * num_samples)


def order(seed: int, epoch: int, sources: Sequence[Source], shards_in_use: int) -> np.ndarray:
    """Returns int64[num_samples], the samples of an epoch in their order, numbered through all sources.

    Shards come in random order, mixed in groups of `shards_in_use`, so that no more are needed at a time; a batch that
    spans two groups touches twice as many.

    Example: four shards of two samples in groups of two may give [5 0 4 1 | 7 2 3 6].
    """
    bits = np.random.PCG64([seed, epoch])

    def shuffled(numbers: np.ndarray) -> np.ndarray:
        # numpy keeps the raw stream stable across versions, its `permutation` not: a resumed run must not be reordered
        return numbers[np.argsort(bits.random_raw(len(numbers)), kind="stable")]

    pieces: list[np.ndarray] = []
    first = 0
    for source in sources:
        starts = first + np.concatenate([[0], np.cumsum(source.shard_sizes, dtype=np.int64)])
        first = int(starts[-1])
        whole = [np.arange(start, end) for start, end in pairwise(starts)]
        pieces += whole * int(source.repeat)
        if num_more := source.num_drawn - int(source.repeat) * (first - int(starts[0])):
            more = np.sort(shuffled(np.arange(starts[0], first))[:num_more])
            pieces += [piece for piece in np.split(more, np.searchsorted(more, starts[1:-1])) if len(piece)]
    turn = shuffled(np.arange(len(pieces)))
    groups = [turn[i : i + shards_in_use] for i in range(0, len(turn), shards_in_use)]
    mixed = [shuffled(np.concatenate([pieces[piece] for piece in group])) for group in groups]
    return np.concatenate(mixed) if mixed else np.zeros(0, dtype=np.int64)


def shard_sequence(numbers: np.ndarray, shard_starts: np.ndarray) -> Iterator[int]:
    """Yields each shard that the samples `numbers` need, in the order of first need.

    Args:
        numbers: int64[n], samples in the order they will be read.
        shard_starts: int64[num_shards], the number of each shard's first sample, ascending.
    """
    shards = np.searchsorted(shard_starts, numbers, side="right") - 1
    _, first_use = np.unique(shards, return_index=True)
    yield from shards[np.sort(first_use)].tolist()


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Returns the optimizer steps of one epoch; the last batch may be short, nothing is dropped."""
    return -(-num_samples // global_batch_size)


def batch_position(step: int, num_samples: int, global_batch_size: int) -> tuple[int, slice]:
    """Returns the epoch of a step (counted from 0) and the part of that epoch's order that is its global batch."""
    epoch, batch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    return epoch, slice(batch * global_batch_size, (batch + 1) * global_batch_size)
