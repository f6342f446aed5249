"""Which splits are legal, and how layers are shared out."""

import pytest
from pydantic import ValidationError

from model.parallel import (
    ParallelConfig,
    Stage,
    check_projectors,
    check_split,
    padded_vocab_size,
    split_layers,
    stages_of_rank,
)
from tests.model.test_saisa import tiny


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, {"tp": 4}, r"parallel.tp=4 must divide model.num_query_groups=2; use parallel.tp in \[1, 2\]"),
        ({"ffn_hidden_size": 25}, {"tp": 2}, r"must divide model.ffn_hidden_size=25; use parallel.tp in \[1\]"),
        ({"num_query_groups": 3, "num_attention_heads": 3, "ffn_hidden_size": 24, "hidden_size": 18}, {"tp": 3}, "128"),
        ({}, {"pp": 2, "chunks_per_rank": 2}, "makes more stages than model.num_layers=3"),
        ({}, {"pp": 2, "layers_per_stage": (1, 1)}, r"layers_per_stage=\[1, 1\] must be 2 numbers .* add up to .*=3"),
        ({}, {"pp": 2, "layers_per_stage": (3, 0)}, "each at least 1"),
        ({"tie_embeddings": True}, {"pp": 2}, "tie_embeddings=true keeps embedding and head in one place"),
    ],
)
def test_illegal_splits_are_refused_with_the_legal_ones(changes, parallel, message):
    with pytest.raises(ValueError, match=message):
        check_split(tiny(**changes), ParallelConfig(**parallel))


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 3}, {"pp": 3, "layers_per_stage": (1, 1, 1)}])
def test_legal_splits(parallel):
    check_split(tiny(), ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"sequence_parallel": True}, "needs parallel.tp > 1"),
        ({"chunks_per_rank": 2}, "needs parallel.pp > 1"),
        ({"overlap_grad_reduce": False}, "overlap_param_gather=true needs the buckets of parallel.overlap_grad_reduce"),
        (
            {"overlap_grad_reduce": False, "overlap_param_gather": False, "bucket_parameters": 9},
            "bucket_parameters needs the buckets",
        ),
    ],
)
def test_settings_without_their_use_are_refused(parallel, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**parallel)


@pytest.mark.parametrize(
    ("layers", "last", "num_stages", "expected"),
    [
        ([1] * 8, 0, 4, [2, 2, 2, 2]),
        ([1] * 8, 2, 2, [5, 3]),  # the head costs two layers
        ([1] * 11, 1, 4, [3, 3, 3, 2]),
        ([1] * 5, 0, 2, [2, 3]),
        ([1] * 4, 100, 3, [1, 2, 1]),  # every stage has a layer, whatever the head costs
        ([3, 3, 1, 1, 1, 1], 0, 2, [2, 4]),
    ],
)
def test_the_costliest_stage_costs_least(layers, last, num_stages, expected):
    assert split_layers(layers, last, num_stages) == expected


def test_a_stage_without_a_projector_is_refused_where_nothing_else_is_trained():
    blocks = tiny(num_layers=4, block_size=2, pretrain_projectors="own")
    check_projectors(blocks, "pretrain", [1, 3])
    check_projectors(blocks, "finetune", [3, 1])
    check_projectors(tiny(num_layers=4, block_size=2), "pretrain", [3, 1])
    with pytest.raises(ValueError, match="stage 1 of the pipeline, layers 3 to 3, has no projector"):
        check_projectors(blocks, "pretrain", [3, 1])


def test_interleaved_stages_are_dealt_in_turn():
    assert stages_of_rank([2, 2, 1, 1], pp_rank=0, pp=2) == [Stage(0, 4, range(2)), Stage(2, 4, range(4, 5))]
    last = stages_of_rank([2, 2, 1, 1], pp_rank=1, pp=2)
    assert last == [Stage(1, 4, range(2, 4)), Stage(3, 4, range(5, 6))]
    assert [stage.is_last for stage in last] == [False, True] and not last[0].is_first


def test_the_vocabulary_is_filled_up_the_same_at_any_split():
    assert [padded_vocab_size(tiny(vocab_size=size)) for size in (1, 128, 129)] == [128, 128, 256]
