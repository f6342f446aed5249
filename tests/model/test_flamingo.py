"""Cross-attention blocks against plain PyTorch, transformers' Llama 3.2, and the language model without them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from model.config import ModelConfig, VisionConfig
from model.cross_attention import cross_attention, seen_images
from model.flamingo import FlamingoLayer
from model.flamingo_start import random_blocks
from model.flops import parameter_counts
from model.pack import Pack
from model.segments import Segments
from model.weights import from_hf, load_parameters, name_table, random_projectors
from tests.model.flamingo_reference import flamingo_logits
from tests.model.packs import PACKS, pack_of
from tests.model.reference import reference_loss
from tests.model.test_saisa import (
    LAYOUTS,
    V,
    assert_equal_to_rounding,
    assert_learns_as_the_reference,
    build,
    gradient,
    random_pack,
    random_weights,
    tiny,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "open_flamingo": {"cross_attention": "open_flamingo", "cross_attention_every": 2},
    "open_flamingo, every layer": {
        "cross_attention": "open_flamingo",
        "cross_attention_every": 1,
        "resampler_tokens": 3,
    },
    "llama_3_2": {"cross_attention": "llama_3_2", "cross_attention_every": 2},
    "llama_3_2, linear": {"cross_attention": "llama_3_2", "cross_attention_every": 3, "projector": "linear"},
    "llama_3_2, one group": {"cross_attention": "llama_3_2", "cross_attention_every": 1, "num_query_groups": 1},
}


def flamingo(name: str) -> ModelConfig:
    return tiny(architecture="flamingo", **VARIANTS[name])


def images_before(pack: Pack) -> list[list[int]]:
    """How many images stand before each text token, sample by sample."""
    images = pack.image_positions.split(pack.image_counts)
    return [
        [int((own < at).sum()) for at in text]
        for own, text in zip(images, pack.positions_T.split(pack.text_lengths), strict=True)
    ]


def reference_total(weights: dict[str, Tensor], model: ModelConfig, pack: Pack, features: Tensor) -> Tensor:
    total, tokens = torch.zeros((), dtype=torch.float64), pack.token_ids_T.split(pack.text_lengths)
    targets, images = pack.targets_T.split(pack.text_lengths), list(features.double().split(V))
    for number, before in enumerate(images_before(pack)):
        own, images = images[: pack.image_counts[number]], images[pack.image_counts[number] :]
        total = total + reference_loss(flamingo_logits(weights, model, tokens[number], own, before), targets[number])
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_the_reference(name, megatron):
    model = flamingo(name)
    weights = {key: tensor.double().requires_grad_() for key, tensor in random_weights(model).items()}
    pack, features = random_pack(model, LAYOUTS)
    expected = reference_total(weights, model, pack, features)
    expected.backward()

    assert_learns_as_the_reference(model, True, pack, features, expected, weights)


@pytest.mark.parametrize("name", ["open_flamingo", "llama_3_2"])
def test_new_blocks_leave_the_language_model_as_it_is(name, megatron):
    """Gates of zero: the logits of the language model for the text alone, as if there had been no images."""
    model, alone = flamingo(name), tiny()
    pack, features = random_pack(model, LAYOUTS)
    weights = dict(from_hf(random_weights(model).items(), name_table(model)))
    wanted = {entry.ours for entry in name_table(model)}
    ours, plain = build(model, shared_projector=True), build(alone, shared_projector=True)
    weights |= dict(random_projectors(model, ["shared_projector."], seed=0))
    load_parameters(ours, [*weights.items(), *random_blocks(model, seed=1, wanted=wanted)])
    load_parameters(plain, [*weights.items(), *random_projectors(alone, ["shared_projector."], seed=0)])
    text = replace(pack.text_alone, token_ids_T=pack.token_ids_T, targets_T=pack.targets_T)
    assert text.positions_T.tolist() == [at for length in pack.text_lengths for at in range(length)]
    assert torch.equal(ours(pack, features), plain(text, features[:0]))


@pytest.mark.parametrize("name", ["open_flamingo", "llama_3_2"])
@pytest.mark.parametrize("layout", [(3,), (4, 0)], ids=["no image", "none before text"])
def test_a_pack_whose_text_sees_no_image_keeps_every_parameter_in_the_graph(name, layout, megatron):
    model = flamingo(name)
    ours = build(model, shared_projector=True)
    load_parameters(ours, from_hf(random_weights(model).items(), name_table(model)))
    ours(*random_pack(model, [layout])).sum().backward()
    assert [key for key, parameter in ours.named_parameters() if parameter.grad is None] == []
    unused = ("shared_projector.", ".block.attention") if name == "open_flamingo" else ("shared_projector.", ".block.")
    moved = {key for key, parameter in ours.named_parameters() if gradient(parameter).any()}
    assert moved and not [key for key in moved if any(part in key for part in unused)]


# Of a sample `a <image> b <image> c d` and one `e`, with 2 visual tokens an image: first and end of what each sees
SEEN = {False: [None, (0, 2), (0, 4), (0, 4), None], True: [None, (0, 2), (2, 4), (2, 4), None]}
KEYS = {False: [0, 1, 0, 1, 2, 3], True: [0, 1, 2, 3]}


@pytest.mark.parametrize("latest_alone", SEEN)
def test_which_images_text_sees(latest_alone):
    seen = seen_images(pack_of([(1, 1, 2), (1,)], num_tokens_per_image=2), latest_alone)
    found = zip(seen.first_T.tolist(), seen.end_T.tolist(), strict=True)
    assert [(first, end) if end > first else None for first, end in found] == SEEN[latest_alone]
    assert seen.rows_Q.tolist() == [1, 2, 3]
    assert seen.segments.cu_seqlens_q.tolist() == [0, 1, 3]
    assert seen.segments.key_indices.tolist() == KEYS[latest_alone]


@pytest.mark.parametrize("latest_alone", [False, True])
@pytest.mark.parametrize("name", PACKS)
def test_segments_give_what_masks_give(name, latest_alone, monkeypatch):
    """The sequences of a flash kernel, each a plain softmax, against one mask a sample: forward and gradients."""
    layouts, num_text, num_visual = PACKS[name]
    pack = pack_of(layouts, V, num_text, num_visual)
    seen, generator = seen_images(pack, latest_alone), torch.Generator().manual_seed(0)
    num_rows = {"text": len(pack.positions_T), "visual": len(pack.visual_positions_I)}
    q, k, v, weight = (
        torch.randn(num_rows[kind], heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for kind, heads in (("text", 4), ("visual", 2), ("visual", 2), ("text", 4))
    )
    results = []
    for kernel in ("dense", "flash_attn"):
        monkeypatch.setattr("model.cross_attention._kernel", lambda *_, kernel=kernel: kernel)
        monkeypatch.setattr("model.cross_attention.varlen_attention", plain_varlen)
        out = cross_attention(q, k, v, pack, seen)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for dense, varlen in zip(*results, strict=True):
        torch.testing.assert_close(varlen, dense)


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str, is_causal: bool) -> Tensor:
    """What a flash kernel computes over sequences without a mask."""
    assert kernel == "flash_attn" and not is_causal
    k, v = (x[segments.key_indices].repeat_interleave(2, dim=1) for x in (k, v))
    parts = zip(
        q.split(segments.cu_seqlens_q.diff().tolist()),
        k.split(segments.cu_seqlens_k.diff().tolist()),
        v.split(segments.cu_seqlens_k.diff().tolist()),
        strict=True,
    )
    weights = (((torch.einsum("qnh,knh->nqk", a, b) / a.shape[-1] ** 0.5).softmax(-1), c) for a, b, c in parts)
    return torch.cat([torch.einsum("nqk,knh->qnh", weight, values) for weight, values in weights])


def test_llama_3_2_is_that_of_transformers(megatron):
    """A block against `MllamaCrossAttentionDecoderLayer`, on rows that see the one image; it has no others' rule."""
    model = tiny(architecture="flamingo", cross_attention="llama_3_2", cross_attention_every=1, head_dim=4)
    ours, weights = build(model, shared_projector=True), random_weights(model)
    load_parameters(ours, from_hf(weights.items(), name_table(model)))
    config = MllamaTextConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5
    )
    config._attn_implementation = "eager"
    theirs, name = MllamaCrossAttentionDecoderLayer(config, layer_idx=0), "model.layers.1.cross_attention."
    renamed = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention_gate":
        "cross_attn_attn_gate", "ffn_gate": "cross_attn_mlp_gate", "mlp": "mlp",
    }  # fmt: skip
    state = {key.removeprefix(name): tensor for key, tensor in weights.items() if key.startswith(name)}
    theirs.load_state_dict(
        {key.replace(part, renamed[part]) if (part := key.split(".")[0]) in renamed else f"cross_attn.{key}": tensor
         for key, tensor in state.items()}
    )  # fmt: skip
    pack, _ = random_pack(model, [(0, 5)])
    generator = torch.Generator().manual_seed(0)
    text, visual = (torch.randn(rows, 16, generator=generator, requires_grad=True) for rows in (5, V))
    layer = ours.layers["1"]
    assert isinstance(layer, FlamingoLayer) and layer.block is not None
    found = layer.block(text, visual, pack)
    expected = theirs(text[None], visual[None], None, None, None)[0].reshape(found.shape)  # a tuple in some versions
    assert_equal_to_rounding(found, expected.double())
    weight = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((x * weight).sum(), (text, visual)) for x in (found, expected)]
    for mine, his in zip(*gradients, strict=True):
        assert_equal_to_rounding(mine, his.double())


VICUNA_7B = dict(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32, head_dim=128
)
CLIP_L = VisionConfig(hidden_size=1024, num_layers=24, image_size=336, patch_size=14)
LLAMA_BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 2 * 128 + 2  # q, k, v, o; FFN; norms; of heads; gates
OPEN_BLOCK = 2 * 512 * 4096 + 1024 * 1024 + 2 * 4 * 4096**2 + 2 * 2 * 4096 + 2  # q, o; k and v; FFN; norms; gates
RESAMPLER_LAYER = 4 * 1024 * 512 + 2 * 4 * 1024**2 + 3 * 2 * 1024


@pytest.mark.parametrize(
    ("kind", "blocks", "front"),
    [
        ("open_flamingo", 8 * OPEN_BLOCK, 6 * RESAMPLER_LAYER + 2 * 1024 + 64 * 1024),
        ("llama_3_2", 8 * LLAMA_BLOCK, 20_979_712),
    ],
)
def test_parameters_added_to_vicuna_7b(kind, blocks, front):
    """1.18 B and 1.64 B with a block for every fourth layer, against SAISA's 671 M and LLaVA's 21 M."""
    settings = {"architecture": "flamingo", "cross_attention": kind, "cross_attention_every": 4}
    model = tiny(**VICUNA_7B, vocab_size=32000, vision=CLIP_L, **settings)
    for phase in ("pretrain", "finetune"):
        counts = parameter_counts(model, phase)
        assert (counts.blocks, counts.projectors, counts.num_trained) == (blocks, front, blocks + front)
    assert [i for i, layer in enumerate(model.layers) if layer.shown == "block"] == [3, 7, 11, 15, 19, 23, 27, 31]
