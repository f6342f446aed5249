"""Sample order and global batches: pure functions, so tested without data."""

import numpy as np

from pipeline.order import SHARDS_IN_USE, batch_position, order, steps_per_epoch

SIZES = [7, 3, 5, 1] * 20


def test_every_sample_comes_once_and_epochs_and_seeds_differ():
    first = order(0, 0, SIZES)
    assert sorted(first) == list(range(sum(SIZES)))
    assert (order(0, 0, SIZES) == first).all()
    assert (order(0, 1, SIZES) != first).any()
    assert (order(1, 0, SIZES) != first).any()


def test_few_shards_are_in_use_at_a_time():
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)[order(3, 0, SIZES)]
    last_use = {shard: i for i, shard in enumerate(shard_of)}
    first_use = {shard: i for i, shard in reversed(list(enumerate(shard_of)))}
    for i in range(len(shard_of)):
        assert sum(first_use[s] <= i <= last_use[s] for s in first_use) <= SHARDS_IN_USE


def test_batches_have_exactly_n_samples_and_the_tail_is_kept():
    assert steps_per_epoch(10, 4) == 3
    parts = [batch_position(step, 10, 4) for step in range(6)]
    assert [epoch for epoch, _ in parts] == [0, 0, 0, 1, 1, 1]
    assert [len(range(10)[part]) for _, part in parts] == [4, 4, 2, 4, 4, 2]
