"""Generation with cross-attention: images are made into keys once, and kept, whatever the cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from model.hf.flamingo_saisa import CrossAttention
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from tests.model.hf_models import GREEDY, IMAGE, ROWS, I, V, all_pixels, batch, build, pixels, reference

KINDS = ("open_flamingo", "llama_3_2")


def flamingo(kind: str) -> SaisaForConditionalGeneration:
    latents: dict[str, Any] = {"resampler_tokens": V} if kind == "open_flamingo" else {}
    return build(architecture="flamingo", cross_attention=kind, cross_attention_every=2, **latents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_static_cache_is_a_dynamic_one(kind: str, options: dict[str, Any]) -> None:
    model, rows = flamingo(kind), [row for row in ROWS if row[-1] != IMAGE]
    inputs = batch(rows) | {"pixel_values": all_pixels()}
    dynamic: Any = model.generate(**inputs, **GREEDY, **options)
    static: Any = model.generate(**inputs, **GREEDY, **options, cache_implementation="static")
    without: Any = model.generate(**inputs, **GREEDY, **options, use_cache=False)
    assert torch.equal(dynamic, static) and torch.equal(dynamic, without)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_with_another_image(kind: str) -> None:
    """Its second turn asks the images of both, which are encoded and projected once each."""
    model, images, calls = flamingo(kind), pixels(2), []
    assert images is not None
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.k_proj.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
    cache = DynamicCache()
    first: Any = model.generate(**batch([[1, *I, 7]]), pixel_values=images[:1], past_key_values=cache, **GREEDY)
    second = [*first[0].tolist(), 5, *I, 6]
    found: Any = model.generate(**batch([second]), pixel_values=images, past_key_values=cache, **GREEDY)
    assert calls == [V, V]
    told = found[0].tolist()
    logits = reference(model, told[:-1], images)
    assert logits[-GREEDY["max_new_tokens"] :].argmax(-1).tolist() == told[len(second) :]


@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_cache_forgets_its_images(kind: str) -> None:
    model, cache = flamingo(kind), DynamicCache()
    ids = torch.tensor([[1, 5, 9, 9, 3]])
    with torch.no_grad():
        model(**batch([[1, *I, 7]]), pixel_values=pixels(1), past_key_values=cache)
        cache.crop(0)
        found = model(ids, past_key_values=cache).logits
        assert torch.equal(found, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    model, found = flamingo(kind).train(), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = batch(ROWS[:3])
        loss = model(**inputs, labels=inputs["input_ids"], pixel_values=all_pixels()[:2]).loss
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))
    for plain, checkpointed in zip(*found, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain)
