"""Packs keep their budgets and lose nothing; ranks get even work."""

import random

import pytest

from pipeline.data.packing import SampleSize, deal_samples, imbalance, pack_samples, padded_rows


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
    ranks = deal_samples(costs, 2)
    assert [sum(costs[i] for i in rank) for rank in ranks] == [8, 8]
    assert deal_samples([5.0], 3) == [[0], [], []]
    assert deal_samples([], 2) == [[], []]


def test_imbalance_is_what_the_busiest_rank_has_above_the_mean():
    assert imbalance([[0], [1, 2]], [4, 3, 5]) == pytest.approx(8 / 6 - 1)
    assert imbalance([[0], [1]], [3, 3]) == 0 == imbalance([[], []], [])


@pytest.mark.parametrize(("num_rows", "multiple", "expected"), [(0, 1, 1), (0, 16, 16), (16, 16, 16), (17, 16, 32)])
def test_rows_are_padded_up(num_rows, multiple, expected):
    assert padded_rows(num_rows, multiple) == expected
