"""The Hugging Face model against the equations, and against itself: batched and single, with a cache and without."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel, DynamicCache

from model.hf.vision_saisa import stored_name
from tests.model.hf_models import (
    GREEDY,
    IMAGE,
    ROWS,
    I,
    V,
    all_pixels,
    batch,
    build,
    own_pixels,
    pixels,
    reference,
)
from tests.transformers_versions import encoder_inside

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"vision": "siglip"},
    "linear-projector": {"projector_type": "linear"},
    "qkv-bias-tied-theta": {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 1e6},
    "all-heads-wide-head-first-layer": {"num_key_value_heads": 4, "head_dim": 16, "vision_select_layer": 1},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_equations(variant: str, side: str) -> None:
    model = build(**VARIANTS[variant])
    with torch.no_grad():
        logits = model(**batch(ROWS, side), pixel_values=all_pixels()).logits
    for number, row in enumerate(ROWS):
        expected = reference(model, row, own_pixels(number))
        mine = logits[number, -len(row) :] if side == "left" else logits[number, : len(row)]
        text = torch.tensor(row) != IMAGE
        # fp32 against fp64, logits of about 7: worst seen 1.4e-5
        torch.testing.assert_close(mine[text, :IMAGE].double(), expected, rtol=0, atol=1e-4)
        assert not mine[~text, :IMAGE].any(), "visual positions predict nothing"
        assert torch.all(mine[:, IMAGE] == -1e4), "and nobody predicts a visual token"


def test_text_does_not_see_what_comes_later() -> None:
    model = build()
    row = torch.tensor([[1, 4, 5, *I, 6]])
    first, second = model(row, pixel_values=pixels(1, 1)).logits, model(row, pixel_values=pixels(1, 2)).logits
    assert torch.equal(first[:, :3], second[:, :3])
    assert (first[:, -1] - second[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_generation_is_single_generation(use_cache: bool) -> None:
    model = build()
    rows = [row for row in ROWS if row[-1] != IMAGE]
    inputs = batch(rows)
    together = model.generate(**inputs, pixel_values=all_pixels(), use_cache=use_cache, **GREEDY)
    for number, row in enumerate(rows):
        alone = model.generate(**batch([row]), pixel_values=own_pixels(number), **GREEDY)
        assert torch.equal(together[number, inputs["input_ids"].shape[1] :], alone[0, len(row) :])


def test_beams_and_several_answers_keep_their_own_images() -> None:
    model = build()
    inputs = batch(ROWS)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, pixel_values=all_pixels(), **beams, **GREEDY)
    for number, row in enumerate(ROWS):
        alone = model.generate(**batch([row]), pixel_values=own_pixels(number), **beams, **GREEDY)
        width = inputs["input_ids"].shape[1]
        assert torch.equal(together[2 * number : 2 * number + 2, width:], alone[:, len(row) :])


def test_cache_holds_visual_keys_once_and_decoding_equals_a_whole_pass() -> None:
    model = build()
    row = ROWS[4]
    whole = model(torch.tensor([row]), pixel_values=own_pixels(4)).logits
    cut = 2 + V + 2 + V  # behind the second image
    images = own_pixels(4)
    assert images is not None
    cache = DynamicCache()
    parts = [model(torch.tensor([row[:cut]]), pixel_values=images[:2], past_key_values=cache).logits]
    assert cache.get_seq_length() == cut
    parts.append(model(torch.tensor([row[cut : cut + 1 + V]]), pixel_values=images[2:], past_key_values=cache).logits)
    for token in row[cut + 1 + V :]:
        parts.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    assert cache.get_seq_length() == len(row)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)  # worst seen 1e-5


def test_generation_goes_on_from_a_cache() -> None:
    model = build()
    prompt, rest = [1, *I, 7, 8], [5, 6]
    images = pixels(1)
    cache = DynamicCache()
    first = model.generate(**batch([prompt]), pixel_values=images, past_key_values=cache, **GREEDY)
    second = [*first[0].tolist(), *rest]
    with_cache: Any = model.generate(**batch([second]), pixel_values=images, past_key_values=cache, **GREEDY)
    whole: Any = model.generate(**batch([second]), pixel_values=images, **GREEDY)
    assert torch.equal(with_cache, whole)


def test_logits_to_keep() -> None:
    model = build()
    inputs = batch(ROWS) | {"pixel_values": all_pixels()}
    whole = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
    index = torch.tensor([9, 12])
    torch.testing.assert_close(model(**inputs, logits_to_keep=index).logits, whole[:, index])


def test_loss_skips_what_follows_a_visual_token() -> None:
    model = build()
    row = [1, 4, *I, 6, 7, 8]
    ids = torch.tensor([row])
    output = model(ids, pixel_values=pixels(1), labels=ids)
    log_probabilities = output.logits[0].log_softmax(-1)
    # 4 is predicted by 1; 6 by nobody (a visual token stands before it); 7 by 6; 8 by 7.
    expected = -(log_probabilities[0, 4] + log_probabilities[6, 7] + log_probabilities[7, 8]) / 3
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")}


def test_weights_are_named_as_in_the_release() -> None:
    names = set(map(stored_name, build(attention_bias=True).state_dict()))
    layer = "model.layers.2."
    for name in ("mm_projector.0.bias", "mm_projector.2.weight", "self_attn.v_proj.bias", "mlp.gate_proj.weight"):
        assert layer + name in names
    assert layer + "self_attn.o_proj.bias" not in names
    prefix = "model.vision_tower.vision_model."
    encoder = encoder_inside(CLIPVisionModel(build().config.vision_config))
    assert {name.removeprefix(prefix) for name in names if "vision_tower" in name} == set(encoder.state_dict())
    assert "model.layers.0.mm_projector.bias" in build(projector_type="linear").state_dict()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": [[1, *I, 2]], "num_images": 2},
            "2 images need 8 placeholders in input_ids .4 each., but there are 4",
        ),
        ({"input_ids": [[1, *I, 2]], "num_images": 0}, "4 image placeholders but there are no pixel_values"),
        ({"input_ids": [[1, 3, 2]], "num_images": 1}, "1 images need 4 placeholders .* there are 0"),
        ({"input_ids": [[1, *I]], "num_images": 1}, "add text after the image"),
    ],
)
def test_images_and_placeholders_must_match(inputs: dict[str, Any], message: str) -> None:
    model = build()
    ids = torch.tensor(inputs["input_ids"])
    with pytest.raises(ValueError, match=message):
        if message.startswith("add"):
            model.generate(ids, pixel_values=pixels(1), **GREEDY)
        else:
            model(ids, pixel_values=pixels(inputs["num_images"]))


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \[num_images, 3, 28, 28\]"):
        build()(torch.tensor([[1, *I, 2]]), pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_type": "mpl"}, "projector_type='mpl' must be one of mlp, linear"),
        ({"vision_select_layer": -5}, "must be one of the 4 hidden states"),
        ({"vision_config": {"model_type": "vit"}}, "vision_config.model_type='vit' must be one of"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)
