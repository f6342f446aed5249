"""`generate()` in all its ways, with images: against greedy decoding of the equations, written out token by token."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, WatermarkingConfig
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from model.hf.modeling_saisa import SaisaForConditionalGeneration
from tests.model.hf_models import GREEDY, IMAGE, ROWS, I, V, all_pixels, batch, build, own_pixels, pixels, reference

ROW = [1, 5, *I, 7, 8, 5, 6]
Change = Callable[[Tensor, list[int]], Tensor]  # logits [VOCAB] and the ids so far, to logits


def decode(model: SaisaForConditionalGeneration, row: list[int], images: Tensor | None, change: Change) -> list[int]:
    """Returns the answer that always takes the largest changed logit, without a cache."""
    ids = list(row)
    for _ in range(GREEDY["max_new_tokens"]):
        ids.append(int(change(reference(model, ids, images)[-1], ids).argmax()))
    return ids[len(row) :]


def penalised(logits: Tensor, ids: list[int], penalty: float) -> Tensor:
    """Source: CTRL (arXiv 1909.05858), section 4.1, with the sign that transformers minds."""
    said = torch.tensor(sorted(set(ids) - {IMAGE}))
    logits[said] = torch.where(logits[said] < 0, logits[said] * penalty, logits[said] / penalty)
    return logits


def without_repeats(logits: Tensor, ids: list[int]) -> Tensor:
    """No pair of ids comes twice."""
    for first, second in pairwise(ids):
        if first == ids[-1] and second != IMAGE:
            logits[second] = -torch.inf
    return logits


def biased(logits: Tensor, ids: list[int]) -> Tensor:
    logits[7] += 6.0
    return logits


PROCESSORS: dict[str, tuple[dict[str, Any], Change]] = {
    "none": ({}, lambda logits, ids: logits),
    "repetition": ({"repetition_penalty": 1.5}, lambda logits, ids: penalised(logits, ids, 1.5)),
    "encoder-repetition": ({"encoder_repetition_penalty": 1.5}, lambda logits, ids: penalised(logits, ROW, 1 / 1.5)),
    "no-repeat": ({"no_repeat_ngram_size": 2}, without_repeats),
    "bias": ({"sequence_bias": {(7,): 6.0}}, biased),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_do_what_they_say(name: str, cache: str) -> None:
    model = build()
    options, change = PROCESSORS[name]
    expected = decode(model, ROW, pixels(1), change)
    if cache == "static":
        options = options | {"cache_implementation": "static"}
    found: Any = model.generate(**batch([ROW]), pixel_values=pixels(1), **options, **GREEDY)
    assert found[0, len(ROW) :].tolist() == expected


MORE: list[dict[str, Any]] = [
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 8]]},
    {"guidance_scale": 1.5},
    {"guidance_scale": 1.5, "repetition_penalty": 1.3, "renormalize_logits": True, "num_beams": 2},
    {"min_new_tokens": 3, "eos_token_id": 2, "exponential_decay_length_penalty": (2, 1.5)},
    {"num_beams": 3, "repetition_penalty": 1.3, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 50.0, "num_return_sequences": 3},
    {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "top_k": 0},
    {"do_sample": True, "min_p": 0.001, "watermarking_config": WatermarkingConfig(bias=2.0)},
    {"remove_invalid_values": True, "forced_eos_token_id": 2, "begin_suppress_tokens": [9]},
]


@pytest.mark.parametrize("options", MORE, ids=lambda options: "+".join(options))
def test_no_processor_makes_it_say_an_image_or_nonsense(options: dict[str, Any]) -> None:
    model = build()
    torch.manual_seed(0)
    inputs = batch(ROWS[:-1]) | {"pixel_values": all_pixels()[:4]}
    output: Any = model.generate(
        **inputs, **GREEDY | options, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert output.sequences[:, inputs["input_ids"].shape[1] :].max() < IMAGE
    assert all(not scores.isnan().any() for scores in output.scores)
    assert all(torch.all(logits[:, IMAGE] == -1e4) for logits in output.logits)


@pytest.mark.parametrize("is_told", [True, False])
def test_prompt_lookup_never_drafts_an_image(monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    model = build()
    row = [1, 5, *I, 7, 8, 5]  # lookup goes on from the last 5 as after the first: with the image
    drafts: list[list[int]] = []
    lookup = PromptLookupCandidateGenerator.get_candidates

    def spy(self: Any, input_ids: Any) -> tuple[Tensor, Tensor | None]:
        found, logits = lookup(self, input_ids)
        drafts.append(found[0, input_ids.shape[1] :].tolist())
        return found, logits

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", spy)
    model.generation_config = GenerationConfig(suppress_tokens=[IMAGE] if is_told else None)
    options: dict[str, Any] = GREEDY | {"eos_token_id": 2, "prompt_lookup_num_tokens": 3}  # 4.57 wants an end
    found: Any = model.generate(**batch([row]), pixel_values=pixels(1), **options)
    assert found[0, len(row) :].tolist() == decode(model, row, pixels(1), PROCESSORS["none"][1])
    assert drafts[0] == ([] if is_told else [IMAGE] * 3)


def test_an_assistant_drafts_with_the_images_too() -> None:
    model, row = build(), [1, 5, *I, 7, 8]
    expected = decode(model, row, pixels(1), PROCESSORS["none"][1])
    for assistant in (model, build(num_hidden_layers=1)):
        assistant.generation_config = GenerationConfig(num_assistant_tokens=3)
        found: Any = model.generate(**batch([row]), pixel_values=pixels(1), **GREEDY, assistant_model=assistant)
        assert found[0, len(row) :].tolist() == expected
    early: Any = model.generate(**batch([row]), pixel_values=pixels(1), **GREEDY, assistant_early_exit=1)
    assert early[0, len(row) :].tolist() == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_static_cache_is_a_dynamic_one(options: dict[str, Any]) -> None:
    model = build()
    rows = [row for row in ROWS if row[-1] != IMAGE]
    inputs = batch(rows) | {"pixel_values": all_pixels()}
    dynamic: Any = model.generate(**inputs, **GREEDY, **options)
    static: Any = model.generate(**inputs, **GREEDY, **options, cache_implementation="static")
    assert torch.equal(dynamic, static)


def test_a_static_cache_holds_each_key_in_its_slot() -> None:
    model, row = build(), ROWS[4]
    dynamic, static = DynamicCache(), StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        whole = model(**batch([row]), pixel_values=own_pixels(4), past_key_values=dynamic).logits
        cut = 2 + V + 2
        images = own_pixels(4)
        assert images is not None
        parts = [
            model(torch.tensor([row[:cut]]), pixel_values=images[:1], past_key_values=static).logits,
            model(torch.tensor([row[cut:]]), pixel_values=images[1:], past_key_values=static).logits,
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)  # worst seen 1e-5
    for ours, theirs in zip(static.layers, dynamic.layers, strict=True):
        assert ours.keys is not None and theirs.keys is not None
        torch.testing.assert_close(ours.keys[:, :, : len(row)], theirs.keys, rtol=0, atol=1e-4)
        assert not ours.keys[:, :, len(row) :].any()


@pytest.mark.parametrize("mask", ["none", "as-far-as-it-goes", "all-slots"])
def test_a_static_cache_takes_masks_of_two_lengths(mask: str) -> None:
    model, rows = build(), ROWS[1:3]
    inputs = batch(rows) | {"pixel_values": all_pixels()[:2]}
    if mask == "none":
        inputs = batch(rows[:1]) | {"pixel_values": all_pixels()[:1]}
        del inputs["attention_mask"]
    elif mask == "all-slots":
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 20), value=1)
    length = inputs["input_ids"].shape[1] + 20
    cache = StaticCache(config=model.config, max_cache_len=length)
    found = model(**inputs, past_key_values=cache).logits[0, -2:, :IMAGE]
    torch.testing.assert_close(found.double(), reference(model, rows[0], own_pixels(1))[-2:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="must cover the"):
        model(torch.tensor([[5]]), attention_mask=torch.ones(1, 3), past_key_values=cache)


@pytest.mark.parametrize(
    "settings", [{}, {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": 2}], ids=str
)
def test_a_decoding_step_is_one_graph_compiled_once(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**settings)
    inputs = batch(ROWS[1:3]) | {"pixel_values": all_pixels()[:2]}
    length = inputs["input_ids"].shape[1]
    expected: Any = model.generate(**inputs, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=length + 8)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    num_graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    # Training on a CPU leaves a function mode on, which an export in use does not have and dynamo cannot follow.
    is_on = torch._C._len_torch_function_stack() > 0
    step: Any = torch.compile(model.forward, fullgraph=True, backend=count)
    with torch.no_grad(), torch.overrides._pop_mode_temporarily() if is_on else nullcontext():
        ids = [model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for number in range(5):
            slot = torch.tensor([length + number])
            logits = step(input_ids=ids[-1], attention_mask=mask, past_key_values=cache, cache_position=slot).logits
            ids.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(ids, dim=1), expected[:, length:])
    assert num_graphs == 1


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_prompts_padded_on_the_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ends in padding.*padding_side='left'"):
        build().generate(**batch(ROWS[:3], "right"), pixel_values=all_pixels()[:2], **GREEDY, **options)


def test_a_conversation_goes_on_with_another_image() -> None:
    model = build()
    images = pixels(2)
    assert images is not None
    cache = DynamicCache()
    first: Any = model.generate(**batch([[1, *I, 7]]), pixel_values=images[:1], past_key_values=cache, **GREEDY)
    second = [*first[0].tolist(), 5, *I, 6]
    expected = decode(model, second, images, PROCESSORS["none"][1])
    going_on: Any = model.generate(**batch([second]), pixel_values=images, past_key_values=cache, **GREEDY)
    assert going_on[0, len(second) :].tolist() == expected


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_from_embeddings(options: dict[str, Any], with_ids: bool) -> None:
    model = build()
    inputs = batch(ROWS[1:3]) | {"pixel_values": all_pixels()[:2]}
    ids = inputs.pop("input_ids")
    expected: Any = model.generate(ids, **inputs, **GREEDY, **options)
    embeds = model.get_input_embeddings()(ids)
    both = {"input_ids": ids} if with_ids else {}
    found: Any = model.generate(**both, inputs_embeds=embeds, **inputs, **GREEDY, **options)
    assert found[:, -6:].tolist() == expected[:, -6:].tolist()


def test_positions_of_the_caller_are_counted_on() -> None:
    model, row = build(), [1, 5, 9, 3]
    shifted = torch.arange(len(row))[None] + 7
    found: Any = model.generate(**batch([row]), position_ids=shifted, **GREEDY)
    ids = list(row)
    for _ in range(GREEDY["max_new_tokens"]):
        positions = torch.arange(len(ids))[None] + 7
        ids.append(int(model(torch.tensor([ids]), position_ids=positions).logits[0, -1].argmax()))
    assert found[0].tolist() == ids


def test_states_and_weights_through_generation() -> None:
    model = build()
    inputs = batch(ROWS[1:3]) | {"pixel_values": all_pixels()[:2]}
    length = inputs["input_ids"].shape[1]
    output: Any = model.generate(
        **inputs, **GREEDY, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
    )
    for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        num_new = length if step == 0 else 1
        assert [state.shape for state in states] == [(2, num_new, 32)] * 4
        assert [weight.shape for weight in weights] == [(2, 4, num_new, length + step)] * 3
        for weight in weights:
            torch.testing.assert_close(weight[:, :, -1].sum(-1), torch.ones(2, 4))
