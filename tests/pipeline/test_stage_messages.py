"""Which packs a stage receives, against lists written by hand from megatron-core's drawing of its schedule."""

import pytest

from pipeline.stage_messages import packs_received


@pytest.mark.parametrize(
    ("num_packs", "num_chunks", "group_size", "expected", "expected_of_the_first"),
    [
        (3, 1, 4, "0:0 0:1 0:2", ""),
        (4, 2, 2, "0:0 0:1 1:0 1:1 0:2 0:3 1:2 1:3", "1:0 1:1 1:2 1:3"),
        (
            *(4, 3, 2, "0:0 0:1 1:0 1:1 2:0 2:1 0:2 0:3 1:2 1:3 2:2 2:3"),
            "1:0 1:1 2:0 2:1 1:2 1:3 2:2 2:3",
        ),
        # Source: the example of `microbatch_group_size_per_vp_stage` in megatron-core's ModelParallelConfig
        (5, 2, 3, "0:0 0:1 0:2 1:0 1:1 1:2 0:3 0:4 1:3 1:4", "1:0 1:1 1:2 1:3 1:4"),
    ],
)
def test_packs_come_in_the_order_of_the_schedule(num_packs, num_chunks, group_size, expected, expected_of_the_first):
    """As chunk:pack. The first of a pass gets nothing that the last chunk of all has made, and in its first nothing."""
    for leads, texts in ((False, expected), (True, expected_of_the_first)):
        found = packs_received(num_packs, num_chunks, group_size, leads)
        assert " ".join(f"{chunk}:{pack}" for chunk, pack in found) == texts
