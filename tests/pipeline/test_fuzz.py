"""Mutated listings and checkpoints, with fixed seeds; `python -m tests.soak.fuzz` does more of the same."""

from pipeline.checkpoint.run_info import find_checkpoint
from tests.soak.fuzz import fuzz_checkpoints, fuzz_listings


def test_mutated_listings_are_refused_or_read(shard_folder, tmp_path):
    found = fuzz_listings(shard_folder, tmp_path, 200)
    assert found.total() == 200 and found["refused"] > 100 and found["read equal"] > 0


def test_mutated_checkpoints_are_refused_or_read(stage1, megatron, tmp_path):
    found = fuzz_checkpoints(find_checkpoint(stage1.run_dir), tmp_path, 50)
    assert found.total() == 50 and found["refused"] > 25
