"""Sample order and global batches: pure functions, so tested without data."""

from collections import Counter

import numpy as np
import pytest

from pipeline.data.order import Source, batch_position, order, shard_sequence, steps_per_epoch

SIZES = (7, 3, 5, 1) * 20
SOURCE = [Source(SIZES)]


def test_every_sample_comes_once_and_epochs_and_seeds_differ():
    first = order(0, 0, SOURCE, 32)
    assert sorted(first) == list(range(sum(SIZES)))
    assert (order(0, 0, SOURCE, 32) == first).all()
    for other in (order(0, 1, SOURCE, 32), order(1, 0, SOURCE, 32), order(0, 0, SOURCE, 31)):
        assert (other != first).any()


def test_the_order_is_what_it_was():
    """A resumed run must not be reordered by another version of numpy or of this file."""
    assert order(0, 0, [Source((2, 2, 2, 2))], 2).tolist() == [4, 5, 6, 7, 1, 2, 0, 3]
    assert order(7, 3, [Source((3, 1)), Source((4,), 1.5)], 2).tolist() == [6, 7, 2, 0, 1, 3, 7, 6, 5, 4]


@pytest.mark.parametrize("shards_in_use", [1, 5, 32])
def test_few_shards_are_in_use_at_a_time(shards_in_use):
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)[order(3, 0, SOURCE, shards_in_use)]
    last_use = {shard: i for i, shard in enumerate(shard_of)}
    first_use = {shard: i for i, shard in reversed(list(enumerate(shard_of)))}
    for i in range(len(shard_of)):
        assert sum(first_use[s] <= i <= last_use[s] for s in first_use) <= shards_in_use


@pytest.mark.parametrize(("repeat", "times"), [(1.0, {1: 40}), (3.0, {3: 40}), (0.25, {1: 10}), (2.5, {2: 20, 3: 20})])
def test_a_source_is_repeated_and_a_part_of_it_drawn_anew_each_epoch(repeat, times):
    sources = [Source((10, 30)), Source((15, 5, 20), repeat), Source((7,))]
    drawn = []
    for epoch in range(2):
        counts = Counter(order(1, epoch, sources, 4).tolist())
        assert Counter(counts[n] for n in range(40, 80) if counts[n]) == times
        assert all(counts[n] == 1 for n in (*range(40), *range(80, 87)))
        assert sum(counts.values()) == sum(source.num_drawn for source in sources)
        drawn.append({n for n in range(40, 80) if counts[n] > int(repeat)})
    assert drawn[0] != drawn[1] or repeat == int(repeat)


def test_a_mixture_is_mixed():
    """Samples of both sources come in every part of the epoch, not one source after the other."""
    numbers = order(0, 0, [Source((10,) * 30), Source((10,) * 30)], 20)
    shares = [np.mean(part < 300) for part in np.split(numbers, 3)]
    assert min(shares) > 0.2 and max(shares) < 0.8


def test_shards_are_named_in_the_order_of_first_need():
    starts = np.array([0, 10, 20, 30])
    assert list(shard_sequence(np.array([35, 12, 31, 0, 19]), starts)) == [3, 1, 0]
    assert list(shard_sequence(np.array([], dtype=np.int64), starts)) == []


def test_batches_have_exactly_n_samples_and_the_tail_is_kept():
    assert steps_per_epoch(10, 4) == 3
    parts = [batch_position(step, 10, 4) for step in range(6)]
    assert [epoch for epoch, _ in parts] == [0, 0, 0, 1, 1, 1]
    assert [len(range(10)[part]) for _, part in parts] == [4, 4, 2, 4, 4, 2]
