"""Every architecture of the family against the plain reference: losses and every gradient, in fp32."""

from typing import Any

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from model.hf.family_saisa import LayerKind, Update
from model.weights import from_hf, load_parameters, name_table
from tests.model.test_saisa import (
    LAYOUTS,
    RESAMPLER,
    assert_learns_as_the_reference,
    build,
    random_pack,
    random_weights,
    reference_total,
    tiny,
)

# What defines an architecture, and the reference's rule for each of the three layers of `tiny`
FAMILY: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "llava": ({"architecture": "llava"}, [("below", "all")] * 3),
    "naavit": ({"architecture": "naavit"}, [("below", "ffn")] * 3),
    "shortv first": (
        {"architecture": "shortv", "frozen_layers": (0,)},
        [("below", "nothing"), ("below", "all"), ("below", "all")],
    ),
    "shortv middle": (
        {"architecture": "shortv", "frozen_layers": (1,)},
        [("below", "all"), ("below", "nothing"), ("below", "all")],
    ),
    "shortv all": ({"architecture": "shortv", "frozen_layers": (0, 1, 2)}, [("below", "nothing")] * 3),
    "blocks of 2": ({"block_size": 2}, [("features", "ffn"), ("below", "ffn"), ("features", "ffn")]),
    "one block": ({"block_size": 3}, [("features", "ffn"), ("below", "ffn"), ("below", "ffn")]),
}
FLAMINGO = {"architecture": "flamingo", "cross_attention": "open_flamingo", "cross_attention_every": 1}
VARIANTS = [(name, {}) for name in FAMILY] + [
    ("llava", {"num_query_groups": 1, "qkv_bias": True, "projector": "linear"}),
    ("naavit", {"projector": "linear", "tie_embeddings": True}),
    ("llava", RESAMPLER),
    ("blocks of 2", RESAMPLER),
]


def fp64_weights(model: ModelConfig) -> dict[str, Any]:
    return {name: tensor.double().requires_grad_() for name, tensor in random_weights(model).items()}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_loss_and_gradients_equal_the_reference(name, changes, megatron):
    settings, rules = FAMILY[name]
    model = tiny(**settings, **changes)
    weights = fp64_weights(model)
    pack, features = random_pack(model, LAYOUTS)
    expected = reference_total(weights, model, pack, features, rules)
    expected.backward()

    assert_learns_as_the_reference(model, model.shares_projector("finetune"), pack, features, expected, weights)


def test_all_layers_frozen_is_saisa_with_one_projector(megatron):
    frozen = tiny(architecture="shortv", frozen_layers=(0, 1, 2))
    pack, features = random_pack(frozen, LAYOUTS)
    weights = dict(from_hf(random_weights(frozen).items(), name_table(frozen)))
    losses = []
    for model in (frozen, tiny()):
        ours = build(model, shared_projector=True)
        load_parameters(ours, weights.items())
        losses.append(ours(pack, features))
    assert (losses[0] == losses[1]).all()


def test_what_nothing_reads_is_not_computed():
    updates: tuple[Update, ...] = ("none", "ffn", "full")
    none, ffn, full = updates
    assert tiny().layers == (LayerKind(True, none),) * 3
    assert tiny(architecture="llava").layers == tuple(LayerKind(False, update) for update in (full, full, none))
    assert tiny(architecture="naavit").layers == tuple(LayerKind(False, update) for update in (ffn, ffn, none))
    frozen = tiny(architecture="shortv", frozen_layers=(0, 2)).layers
    assert frozen == tuple(LayerKind(False, update) for update in (none, full, none))
    blocks = tiny(num_layers=5, block_size=2).layers
    kinds: list[tuple[bool, Update]] = [(True, ffn), (False, none), (True, ffn), (False, none), (True, none)]
    assert blocks == tuple(LayerKind(*kind) for kind in kinds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "llava", "block_size": 2}, "model.block_size=2 is for model.architecture=saisa"),
        ({"architecture": "saisa", "block_size": 4}, "model.block_size=4 must be at most model.num_layers=3"),
        ({"architecture": "naavit", "frozen_layers": (1,)}, r"frozen_layers=\[1\] is for model.architecture=shortv"),
        ({"resampler_tokens": 8}, "resampler_tokens=8 is for model.projector=resampler; .* as the encoder gives, 4"),
        (
            {"architecture": "llava", "pretrain_projectors": "own"},
            "own is for layers with projectors",
        ),
        ({"architecture": "shortv"}, "shortv needs model.frozen_layers; without any it is llava"),
        (
            {"cross_attention": "llama_3_2"},
            "cross_attention=llama_3_2 is for model.architecture=flamingo; .* remove it",
        ),
        ({"architecture": "llava", "cross_attention_every": 2}, "every=2 is for model.architecture=flamingo"),
        ({"architecture": "flamingo"}, "flamingo needs model.cross_attention; use .*open_flamingo or llama_3_2"),
        (FLAMINGO | {"cross_attention_every": None}, "flamingo needs model.cross_attention_every; use"),
        (FLAMINGO | {"cross_attention_every": 4}, "every=4 must be at most model.num_layers=3, or no layer has"),
        (FLAMINGO | {"cross_attention_every": 0}, "greater than 0"),
        (FLAMINGO | {"projector": "linear"}, "linear with model.cross_attention=open_flamingo, whose resampler"),
        (FLAMINGO | {"block_size": 2}, "model.block_size=2 is for model.architecture=saisa"),
        (FLAMINGO | {"pretrain_projectors": "own"}, "own is for layers with projectors"),
        ({"architecture": "shortv", "frozen_layers": (1, 3)}, "must be numbers from 0 to 2, each once and in order"),
        ({"architecture": "shortv", "frozen_layers": (1, 0)}, "must be numbers from 0 to 2, each once and in order"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        tiny(**settings)
