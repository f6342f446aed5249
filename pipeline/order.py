"""Which samples make up which global batch: pure functions of the seed, the epoch and the shards.

The order is decided before a byte is read and does not know how many machines will read it, so the same run on one
process or a thousand sees the same batches, and resuming continues with the very next sample.
"""

import numpy as np

SHARDS_IN_USE = 32  # shards mixed at a time; a batch that spans two groups touches twice as many


def order(seed: int, epoch: int, shard_sizes: list[int]) -> np.ndarray:
    """Returns int64[num_samples]: every sample number once, mixed within groups of `SHARDS_IN_USE` random shards.

    Example: two groups of two shards with sizes 2, 2, 2, 2 may give [5 0 4 1 | 7 2 3 6].
    """
    bits = np.random.PCG64([seed, epoch])

    def shuffled(numbers: np.ndarray) -> np.ndarray:
        # numpy keeps the raw stream stable across versions, its `permutation` not: a resumed run must not be reordered
        return numbers[np.argsort(bits.random_raw(len(numbers)), kind="stable")]

    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = shuffled(np.arange(len(shard_sizes)))
    groups = []
    for first in range(0, len(shards), SHARDS_IN_USE):
        members = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + SHARDS_IN_USE]]
        groups.append(shuffled(np.concatenate(members)))
    return np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Returns the optimizer steps of one epoch; the last batch may be short, nothing is dropped."""
    return -(-num_samples // global_batch_size)


def batch_position(step: int, num_samples: int, global_batch_size: int) -> tuple[int, slice]:
    """Returns the epoch of a step (counted from 0) and the part of that epoch's order that is its global batch."""
    epoch, batch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    return epoch, slice(batch * global_batch_size, (batch + 1) * global_batch_size)
