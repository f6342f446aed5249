"""The weight-name table: both directions, and refusals."""

from typing import Any

import pytest
import torch

from model.weights import Entry, from_hf, load_parameters, name_table, random_projectors, spread_shared_projector, to_hf
from tests.model.test_saisa import RESAMPLER, random_weights, tiny


def test_keys_and_values_interleave_by_group_and_come_back():
    entry = Entry("kv", ("k", "v"), num_groups=2)
    keys, values = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[5], [6], [7], [8]])
    joined = entry.join([keys, values])
    assert joined.flatten().tolist() == [1, 2, 5, 6, 3, 4, 7, 8]
    assert [part.flatten().tolist() for part in entry.split(joined)] == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True, "tie_embeddings": True}, {"projector": "linear"}, RESAMPLER], ids=str
)
def test_every_weight_survives_the_round_trip(changes):
    model = tiny(**changes)
    weights = random_weights(model)
    back = dict(to_hf(from_hf(weights.items(), name_table(model)), name_table(model)))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_what_fills_up_a_vocabulary_stays_here():
    model = tiny()
    assert model.vocab_size % 128
    for name, theirs in [("embedding.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")]:
        ((found, rows),) = to_hf([(name, torch.arange(128.0)[:, None])], name_table(model))
        assert found == theirs and rows.flatten().tolist() == [*range(model.vocab_size)]


def test_the_row_that_an_export_adds_stays_there():
    model = tiny()
    rows = torch.arange(model.vocab_size + 1.0)[:, None]
    ((_, ours),) = from_hf([("lm_head.weight", rows)], name_table(model, num_image_rows=1))
    assert torch.equal(ours, rows[:-1])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("num_more", [-1, 1])
def test_a_vocabulary_of_another_size_is_neither_cut_nor_filled_up(name: str, num_more: int):
    model = tiny()
    weights = [(name, torch.zeros(model.vocab_size + num_more, 1))]
    wrong = (
        rf"weight {name} has {model.vocab_size + num_more} rows, but config.json says {model.vocab_size} \(vocab_size\)"
    )
    with pytest.raises(ValueError, match=wrong):
        list(from_hf(weights, name_table(model)))


def test_stage_2_starts_from_n_copies_of_the_shared_projector():
    model = tiny()
    shared = dict(random_projectors(model, ["shared_projector."], seed=3))
    spread = dict(spread_shared_projector(shared, model))
    assert len(spread) == model.num_layers * len(shared)
    assert all(
        torch.equal(spread[f"layers.{i}.projector.fc1.bias"], shared["shared_projector.fc1.bias"]) for i in range(3)
    )
    blocks = dict(spread_shared_projector(shared, tiny(block_size=2)))
    assert {name.partition(".projector")[0] for name in blocks} == {"layers.0", "layers.2"}
    assert dict(spread_shared_projector(shared, tiny(architecture="llava"))).keys() == shared.keys()


def test_load_parameters_refuses_other_shapes_and_gaps():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"weight weight: the model has shape \[3, 2\], the file \[2, 3\]"):
        load_parameters(layer, [("weight", torch.zeros(2, 3))])
    with pytest.raises(ValueError, match="1 weight found in no file, such as bias"):
        load_parameters(layer, [("weight", torch.zeros(3, 2))])


def test_a_weight_in_8_bits_keeps_what_the_optimizer_starts_from():
    """Transformer Engine's parameter says what it was before it was rounded, in the type it stands for."""
    layer = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    weight: Any = layer.weight
    weight.get_high_precision_init_val = lambda: weight._high_precision_init_val
    load_parameters(layer, [("weight", torch.tensor([[1.001, 3.017]]))])
    assert weight.get_high_precision_init_val().tolist() == [[1, 3.015625]]
    assert weight.get_high_precision_init_val().dtype == torch.bfloat16
