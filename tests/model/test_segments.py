"""Segments: one varlen sequence for the text between two images gives exactly what the dense masks give."""

import pytest
import torch
from torch import Tensor

from model.attention import dense_attention, key_expansion
from tests.model.packs import NUM_TOKENS_PER_IMAGE, PACKS, pack_of
from tests.model.varlen import varlen_reference

# fp64, so that only a wrong key or mask shows: sums of at most a hundred terms of size 1, in another order
TOLERANCE = 1e-12


def random_qkv(num_text: int, num_keys: int, heads: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_keys)
    shapes = [(num_text, heads[0], 8), (num_keys, heads[1], 8), (num_keys, heads[1], 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_the_example_of_the_docstring():
    segments = pack_of([(1, 2), (2,)]).segments
    assert segments.cu_seqlens_q.tolist() == [0, 1, 3, 5]
    assert segments.cu_seqlens_k.tolist() == [0, 1, 8, 10]
    assert segments.key_indices.tolist() == [4, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert segments.last_copies.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (segments.repeats.tolist(), segments.repeated_rows.tolist()) == ([0], [4])
    assert segments.unseen_rows.tolist() == []
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (2, 7)
    assert segments.cu_seqlens_q.dtype == segments.cu_seqlens_k.dtype == torch.int32
    assert segments.key_indices.dtype == torch.int64


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("name", PACKS)
def test_varlen_attention_over_segments_is_dense_attention(name, heads):
    layouts, num_text_padding, num_visual_padding = PACKS[name]
    pack = pack_of(layouts, NUM_TOKENS_PER_IMAGE, num_text_padding, num_visual_padding)
    q, k, v = inputs = random_qkv(len(pack.positions_T), len(pack.key_positions_S), heads)
    expected = dense_attention(q, k, v, pack)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, inputs, direction)

    gathered_k, gathered_v = (x.index_select(0, pack.segments.key_indices) for x in (k, v))
    found = varlen_reference(q, gathered_k, gathered_v, pack.segments)
    assert (found - expected).abs().max() <= TOLERANCE
    for ours, theirs in zip(torch.autograd.grad(found, inputs, direction), expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", PACKS)
def test_segments_cover_every_query_once_and_no_padding_is_a_key(name):
    layouts, num_text_padding, num_visual_padding = PACKS[name]
    pack = pack_of(layouts, NUM_TOKENS_PER_IMAGE, num_text_padding, num_visual_padding)
    segments = pack.segments
    assert segments.cu_seqlens_q[-1] == len(pack.positions_T)
    assert segments.cu_seqlens_k[-1] == len(segments.key_indices)
    num_queries, num_keys = segments.cu_seqlens_q.diff(), segments.cu_seqlens_k.diff()
    assert (num_queries > 0).all() and (num_keys >= num_queries).all()
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (num_queries.max(), num_keys.max())
    num_images = NUM_TOKENS_PER_IMAGE * sum(pack.image_counts)
    is_padding = (segments.key_indices >= num_images) & (segments.key_indices < num_images + num_visual_padding)
    assert not is_padding.any()


def test_adjacent_images_and_an_image_first_make_no_segment_of_their_own():
    assert len(pack_of([(0, 0, 3)]).segments.cu_seqlens_q) == 2
    assert len(pack_of([(2, 0, 3)]).segments.cu_seqlens_q) == 3
    assert len(pack_of([(2, 0)]).segments.cu_seqlens_q) == 2, "nothing asks about a trailing image"


def test_key_expansion_grows_with_the_images_of_a_sample():
    assert key_expansion(pack_of([(5,), (0, 7)])) == 1
    assert key_expansion(pack_of([(1, 1)])) == 7 / 6
    # the n-th of 9 one-token texts sees n images of 4 and n + 1 text tokens
    assert key_expansion(pack_of([(1,) * 9])) == sum(5 * n + 1 for n in range(9)) / (4 * 8 + 9)


def test_a_moved_pack_takes_its_segments_from_the_one_it_was_copied_from():
    pack = pack_of([(1, 2)])
    moved = pack.to(torch.device("meta"))  # has shapes but no numbers: reading it back would fail
    assert moved.segments.key_indices.device.type == "meta"
    assert moved.segments.key_indices.shape == pack.segments.key_indices.shape
    assert moved.segments.max_seqlen_k == pack.segments.max_seqlen_k == 7
    assert moved.key_ranges is pack.key_ranges


def test_images_out_of_order_are_a_bug():
    pack = pack_of([(1, 1, 1)])
    pack.image_positions.copy_(pack.image_positions.flip(0))
    with pytest.raises(AssertionError, match="in order"):
        _ = pack.segments
