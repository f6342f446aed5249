"""The Hugging Face models of the family against the equations, and LLaVA's against transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.vision_saisa import stored_name
from tests.hf_compat.tiny import SIZES, VISION, VOCAB
from tests.model.hf_models import GREEDY, IMAGE, NUM_IMAGES, ROWS, V, all_pixels, batch, build, own_pixels, reference
from tests.transformers_versions import MAJOR

NUM_LAYERS = SIZES["num_hidden_layers"]
# Visual tokens as in `ROWS`, of four times as many features
RESAMPLER = {
    "projector_type": "resampler",
    "resampler_tokens": V,
    "vision_config": VISION | {"model_type": "clip_vision_model", "patch_size": 7},
}
FLAMINGO = {"architecture": "flamingo"}  # whose reference has rules of its own
FAMILY: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "llava": ({"architecture": "llava"}, [("below", "all")] * NUM_LAYERS),
    "naavit": ({"architecture": "naavit"}, [("below", "ffn")] * NUM_LAYERS),
    "shortv": (
        {"architecture": "shortv", "frozen_layers": [1]},
        [("below", "nothing" if layer == 1 else "all") for layer in range(NUM_LAYERS)],
    ),
    "resampler": (RESAMPLER, [("features", "nothing")] * NUM_LAYERS),
    "resampled blocks": (
        {"block_size": 2} | RESAMPLER,
        [("below" if layer % 2 else "features", "ffn") for layer in range(NUM_LAYERS)],
    ),
    "blocks": (
        {"block_size": 2},
        [("below" if layer % 2 else "features", "ffn") for layer in range(NUM_LAYERS)],
    ),
    "open_flamingo": (
        {"cross_attention": "open_flamingo", "cross_attention_every": 2, "resampler_tokens": V} | FLAMINGO,
        [],
    ),
    "llama_3_2": ({"cross_attention": "llama_3_2", "cross_attention_every": 1} | FLAMINGO, []),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("kernel", "side"), [("sdpa", "left"), ("eager", "right")])
def test_states_weights_and_logits_equal_the_equations(name: str, kernel: str, side: str) -> None:
    settings, rules = FAMILY[name]
    model = build(**settings)
    model.set_attn_implementation(kernel)
    inputs = batch(ROWS, side) | {"pixel_values": all_pixels()}
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    for number, row in enumerate(ROWS):
        trace: dict[str, list[Tensor]] = {}
        logits = reference(model, row, own_pixels(number), trace, rules)
        mine = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        text = torch.tensor(row) != IMAGE
        torch.testing.assert_close(output.logits[number, mine][text, :VOCAB].double(), logits, rtol=0, atol=1e-4)
        for state, expected in zip(output.hidden_states, trace["states"], strict=True):
            torch.testing.assert_close(state[number, mine][text].double(), expected, rtol=0, atol=1e-4)
        for weights, expected in zip(output.attentions, trace["weights"], strict=True):
            own = weights[number, :, mine]
            torch.testing.assert_close(own[:, text, mine].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_generated_step_by_step_is_the_likeliest(name: str) -> None:
    settings, rules = FAMILY[name]
    model = build(**settings)
    generated = model.generate(**batch(ROWS), pixel_values=all_pixels(), **GREEDY)[:, -GREEDY["max_new_tokens"] :]
    for number, row in enumerate(ROWS):
        told = row + generated[number].tolist()
        logits = reference(model, told[:-1], own_pixels(number), rules=rules)
        assert logits[-GREEDY["max_new_tokens"] :].argmax(-1).tolist() == generated[number].tolist()


def theirs(model: SaisaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """LLaVA of transformers with the weights of ours."""
    text = LlamaConfig(**SIZES | {"vocab_size": VOCAB + 1, "rms_norm_eps": model.config.rms_norm_eps})
    vision = CLIPVisionConfig(**VISION)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    llava = LlavaForConditionalGeneration(config).eval()
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            name = stored_name(name)
            name = name if MAJOR == 4 else name.replace(".vision_model.", ".")
        elif name.startswith("model.mm_projector."):
            number = {"0": "1", "2": "2"}[name.split(".")[2]]
            name = f"model.multi_modal_projector.linear_{number}.{name.rsplit('.', 1)[-1]}"
        elif name != "lm_head.weight":
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    missing, unexpected = llava.load_state_dict(renamed, strict=False)
    assert all("post_layernorm" in name or "position_ids" in name for name in missing) and not unexpected
    return llava


def test_llava_is_that_of_transformers() -> None:
    """Logits at text, and the gradient of every weight, of a loss over all text that follows text."""
    model = build(architecture="llava")
    llava = theirs(model)
    for number, row in enumerate(ROWS):
        images = {"pixel_values": own_pixels(number)} if NUM_IMAGES[number] else {}
        ids = torch.tensor([row])
        text = ids[0] != IMAGE
        ours, expected = model(ids, **images).logits[0, text, :VOCAB], llava(ids, **images).logits[0, text, :VOCAB]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(number))
        (ours * weight).sum().backward()
        (expected * weight).sum().backward()
    pairs = [(model.model.mm_projector[0], llava.model.multi_modal_projector.linear_1)]
    pairs += [(model.model.mm_projector[2], llava.model.multi_modal_projector.linear_2)]
    for layer, other in zip(model.model.layers, llava.model.language_model.layers, strict=True):
        pairs += [(getattr(layer.self_attn, f"{n}_proj"), getattr(other.self_attn, f"{n}_proj")) for n in "qkvo"]
        pairs += [(getattr(layer.mlp, f"{n}_proj"), getattr(other.mlp, f"{n}_proj")) for n in ("gate", "up", "down")]
        pairs += [(layer.input_layernorm, other.input_layernorm)]
    for mine, his in pairs:
        torch.testing.assert_close(mine.weight.grad, his.weight.grad, rtol=1e-3, atol=1e-5)
