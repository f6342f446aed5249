"""Mutated listings and checkpoints, with fixed seeds: some in every run of the tests, many in `make soak`."""

import pytest

from pipeline.checkpoint.run_info import find_checkpoint
from tests.soak.fuzz import fuzz_checkpoints, fuzz_listings

MANY = pytest.param(1, 10, marks=pytest.mark.slow)


@pytest.mark.parametrize(("seed", "times"), [(0, 1), MANY])
def test_mutated_listings_are_refused_or_read(seed, times, shard_folder, tmp_path):
    found = fuzz_listings(shard_folder, tmp_path, 200 * times, seed)
    print(dict(found))
    assert found.total() == 200 * times and found["refused"] > 100 * times and found["read equal"] > 0


@pytest.mark.parametrize(("seed", "times"), [(0, 1), MANY])
def test_mutated_checkpoints_are_refused_or_read(seed, times, stage1, megatron, tmp_path):
    found = fuzz_checkpoints(find_checkpoint(stage1.run_dir), tmp_path, 50 * times, seed)
    print(dict(found))
    assert found.total() == 50 * times and found["refused"] > 25 * times
