"""What `forward` takes and gives besides ids and logits, against the equations: states, weights, embeddings, losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.vision_saisa import VisionTower, stored_name
from tests.model.hf_models import IMAGE, ROWS, I, all_pixels, batch, build, own_pixels, pixels, reference


def inputs_of_all(side: str = "left") -> dict[str, Tensor]:
    return batch(ROWS, side) | {"pixel_values": all_pixels()}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_and_weights_equal_the_equations(kernel: str, side: str) -> None:
    model = build()
    model.set_attn_implementation(kernel)
    inputs = inputs_of_all(side)
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=1e-4)
    for number, row in enumerate(ROWS):
        trace: dict[str, list[Tensor]] = {}
        reference(model, row, own_pixels(number), trace)
        mine = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        text = torch.tensor(row) != IMAGE
        for state, expected in zip(output.hidden_states, trace["states"], strict=True):
            assert state.shape == (len(ROWS), width, 32)
            torch.testing.assert_close(state[number, mine][text].double(), expected, rtol=0, atol=1e-4)
            assert not state[number, mine][~text].any()
        for weights, expected in zip(output.attentions, trace["weights"], strict=True):
            assert weights.shape == (len(ROWS), 4, width, width)
            own = weights[number, :, mine]
            torch.testing.assert_close(own[:, text, mine].double(), expected, rtol=0, atol=1e-5)
            assert not own[:, ~text].any(), "visual tokens ask nothing"
            torch.testing.assert_close(own[:, text].sum(-1), torch.ones_like(own[:, text, 0]))  # nothing for padding


def test_weights_of_a_cached_step_cover_all_keys() -> None:
    model, row = build(), ROWS[4]
    trace: dict[str, list[Tensor]] = {}
    reference(model, row, own_pixels(4), trace)
    cache = model(torch.tensor([row[:-1]]), pixel_values=own_pixels(4)).past_key_values
    output = model(torch.tensor([row[-1:]]), past_key_values=cache, output_attentions=True, output_hidden_states=True)
    for weights, expected in zip(output.attentions, trace["weights"], strict=True):
        torch.testing.assert_close(weights[0].double(), expected[:, -1:], rtol=0, atol=1e-5)
    for state, expected in zip(output.hidden_states, trace["states"], strict=True):
        torch.testing.assert_close(state[0].double(), expected[-1:], rtol=0, atol=1e-4)


def test_embeddings_in_the_place_of_ids() -> None:
    model = build()
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight[5, :31] = weight[IMAGE, :31]  # almost a placeholder
    inputs = inputs_of_all()
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, **inputs).logits
    assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
    # With ids beside them, what stands at the placeholders does not matter.
    noise = torch.where((ids == IMAGE)[..., None], torch.randn_like(embeds), embeds)
    assert torch.equal(model(ids, inputs_embeds=noise, **inputs).logits, expected)
    with pytest.raises(ValueError, match="7 images need 28 placeholders in input_ids .4 each., but there are 0"):
        model(inputs_embeds=noise, **inputs)
    with pytest.raises(ValueError, match="28 image placeholders but there are no pixel_values"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model(**inputs)
    old: Any = build(vocab_size=IMAGE)  # an export of before, or a base
    with pytest.raises(ValueError, match="no embedding of the image token; pass input_ids beside inputs_embeds"):
        old(inputs_embeds=embeds, **inputs)
    assert old(ids, inputs_embeds=embeds, **inputs).logits.shape[-1] == IMAGE
    assert old.generate(**batch(ROWS[:2]), pixel_values=pixels(1), max_new_tokens=2, pad_token_id=0).shape == (2, 9)


def test_embeddings_get_gradients() -> None:
    model = build()
    ids = torch.tensor([[1, *I, 7, 8]])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, pixel_values=pixels(1), labels=ids).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad[0, [0, 5]].abs().amin(-1).min() > 0
    assert not embeds.grad[0, 1:5].any(), "placeholders are not read"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain, saving = build().train(), build().train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    saving.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    inputs = inputs_of_all() | {"labels": batch(ROWS)["input_ids"]}
    losses = [model(**inputs, output_hidden_states=True).loss for model in (plain, saving)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    assert len(runs) == 2, "a layer runs again in the backward pass"
    for (name, ours), (_, theirs) in zip(saving.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == ("vision_tower" in name), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6, msg=name)
    assert saving(**inputs_of_all()).past_key_values is None
    with pytest.raises(ValueError, match="runs layers twice"):
        saving(**inputs_of_all(), past_key_values=plain.eval()(**inputs_of_all()).past_key_values)


def test_losses_of_accumulated_batches_are_divided_by_all_targets() -> None:
    model = build()
    ids = torch.tensor([[1, 4, *I, 6, 7, 8]])
    logits = model(ids, pixel_values=pixels(1)).logits[0]
    summed = cross_entropy(logits[[0, 6, 7]], torch.tensor([4, 7, 8]), reduction="sum")
    assert model.accepts_loss_kwargs  # which tells the Trainer to send the number
    for number in (10, torch.tensor(10)):
        loss = model(ids, pixel_values=pixels(1), labels=ids, num_items_in_batch=number).loss
        torch.testing.assert_close(loss, summed / 10)
    # The Trainer's label smoothing takes the mean over the vocabulary, which one logit of -inf would spoil.
    assert -logits.log_softmax(-1).mean() < 100


def test_keywords_that_would_be_ignored_are_refused() -> None:
    model, ids = build(), torch.tensor([[1, 2]])
    with pytest.raises(TypeError, match="does not know cu_seq_lens_q, token_type_ids"):
        model(ids, token_type_ids=ids, cu_seq_lens_q=ids, nothing=None)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], model(ids).logits)


def test_kernels() -> None:
    model = build()
    expected = model(**inputs_of_all()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs_of_all()).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="Flash"):
        build().set_attn_implementation("flash_attention_2")
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="attn_implementation='paged|sdpa' must be 'sdpa' or 'eager'"):
        model(**inputs_of_all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model: Any = build()
    with torch.no_grad():
        expected = model(**inputs_of_all()).logits[..., :IMAGE]
        found = model.to(dtype)(**inputs_of_all())
    assert found.logits.dtype == dtype and found.logits.isfinite().all()
    # bf16 has 8 bits: logits of about 7 that went through three layers; worst seen 0.4 (bf16), 0.05 (fp16)
    assert (found.logits[..., :IMAGE] - expected).abs().mean() < 0.1


def test_the_vocabulary_grows() -> None:
    model: Any = build()
    inputs = inputs_of_all()
    expected = model(**inputs).logits
    model.resize_token_embeddings(IMAGE + 5, mean_resizing=False)
    assert torch.equal(model(**inputs).logits[..., : IMAGE + 1], expected)
    inputs["input_ids"][0, -1] = IMAGE + 3
    assert model.generate(**inputs, max_new_tokens=2, repetition_penalty=1.2, pad_token_id=0).shape[0] == len(ROWS)


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_no_tool_that_looks_for_linear_layers_finds_the_tower(encoder: str) -> None:
    tower = build(vision=encoder).model.vision_tower
    assert not [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    assert not [name for name, _ in tower.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]


def test_weights_keep_their_names_in_files(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(map(stored_name, model.state_dict()))
    assert "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in stored
    again, info = SaisaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded: Any = build(seed_of_weights=1)
    loaded.load_state_dict(stored)  # as a Trainer goes on from a checkpoint
    for other in (again, loaded):
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    tower = VisionTower(model.config.vision_config, -2)
    prefix = "model.vision_tower."
    tower.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
    assert torch.equal(tower(all_pixels()), model.model.vision_tower(all_pixels()))
