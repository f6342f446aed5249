"""Which packs a stage receives, against lists written by hand from megatron-core's drawing of its schedule."""

import pytest

from pipeline.stage_messages import packs_received


@pytest.mark.parametrize(
    ("num_packs", "num_chunks", "group_size", "expected", "expected_of_the_first"),
    [
        (3, 1, 4, [0, 1, 2], []),
        (4, 2, 2, [0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3]),
        (4, 3, 2, [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3], [0, 1, 0, 1, 2, 3, 2, 3]),
        # Source: the example of `microbatch_group_size_per_vp_stage` in megatron-core's ModelParallelConfig
        (5, 2, 3, [0, 1, 2, 0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_packs_come_in_the_order_of_the_schedule(num_packs, num_chunks, group_size, expected, expected_of_the_first):
    """The first of a pass gets nothing that the last chunk of all has made."""
    assert packs_received(num_packs, num_chunks, group_size, leads=False) == expected
    assert packs_received(num_packs, num_chunks, group_size, leads=True) == expected_of_the_first
