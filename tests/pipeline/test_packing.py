"""Packs keep their budgets and lose nothing; ranks get even work."""

import random

from pipeline.packing import SampleSize, deal, pack_samples


def test_packs_hold_every_sample_once_within_both_budgets():
    generator = random.Random(0)
    sizes = [SampleSize(generator.randint(1, 60), generator.randint(0, 3)) for _ in range(300)]
    packs = pack_samples(sizes, max_text=100, max_images=4)
    assert sorted(number for pack in packs for number in pack) == list(range(300))
    for pack in packs:
        assert sum(sizes[n].num_text for n in pack) <= 100
        assert sum(sizes[n].num_images for n in pack) <= 4


def test_a_sample_over_budget_gets_a_pack_of_its_own():
    sizes = [SampleSize(5, 9), SampleSize(5, 1)]
    assert pack_samples(sizes, max_text=100, max_images=4) == [[0], [1]]


def test_work_not_counts_is_dealt_evenly():
    costs = [8, 1, 1, 1, 1, 1, 1, 1, 1]
    ranks = deal([[i] for i in range(9)], 2, costs.__getitem__)
    assert [sum(costs[i] for pack in rank for i in pack) for rank in ranks] == [8, 8]
    assert deal([[0]], 3, costs.__getitem__) == [[[0]], [], []]
