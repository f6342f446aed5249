"""What people do with an exported model: the real peft, accelerate and Trainer, static graphs, every way to generate.

A table over folders and, run in two environments, over versions of transformers. What the answers must be comes from
`make_folder.py`, whose model the tests of this repository hold against the equations.
"""

import io
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, StaticCache, Trainer, TrainingArguments

HERE = Path(__file__).parent
EXPECTED = torch.load(HERE / "expected.pt", weights_only=False)
GENERATE = EXPECTED["generate"]
IS_4 = transformers.__version__.startswith("4.")
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]


@pytest.fixture(params=list(EXPECTED["folders"]))
def name(request):
    return request.param


def load(name, **options):
    return AutoModelForImageTextToText.from_pretrained(HERE / name, trust_remote_code=True, **options).eval()


def inputs_of(name):
    return dict(EXPECTED["folders"][name]["inputs"])


def with_labels(name):
    inputs = inputs_of(name)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def single(name):
    """The third prompt, with three images, on its own: assisted decoding takes one at a time."""
    inputs = inputs_of(name)
    own = inputs["attention_mask"][2].bool()
    rows = {key: inputs[key][2:3, own] for key in ("input_ids", "attention_mask")}
    return rows | {"pixel_values": inputs["pixel_values"][1:4]}


def is_right(name, model):
    with torch.no_grad():
        logits = model(**inputs_of(name)).logits
    torch.testing.assert_close(logits, EXPECTED["folders"][name]["logits"], rtol=0, atol=1e-4)
    assert torch.equal(model.generate(**inputs_of(name), **GENERATE), EXPECTED["folders"][name]["generated"])
    return True


def test_the_image_token_is_an_id_like_others(name):
    model = load(name)
    ids = inputs_of(name)["input_ids"]
    assert ids.max() == model.config.image_token_id < model.config.vocab_size == model.lm_head.out_features
    assert model.get_input_embeddings()(ids).isfinite().all()
    assert torch.all(model(**inputs_of(name)).logits[..., model.config.image_token_id] == -1e4)


WAYS = [
    {"repetition_penalty": 1.1},
    {"encoder_repetition_penalty": 1.1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5]]},
    {"sequence_bias": {(7,): 5.0}},
    {"guidance_scale": 1.5},
    {"renormalize_logits": True},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "repetition_penalty": 1.1, "cache_implementation": "static"},
    {"do_sample": True, "typical_p": 0.9, "repetition_penalty": 1.1},
    {"use_cache": False, "repetition_penalty": 1.1},
    {"cache_implementation": "static"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way))
def test_every_way_to_generate(name, way):
    model, inputs = load(name), inputs_of(name)
    output = model.generate(
        **inputs, **GENERATE | way, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert not (new == model.config.image_token_id).any()
    assert not any(scores.isnan().any() for scores in output.scores)
    if not way.keys() - {"cache_implementation", "renormalize_logits"}:
        assert torch.equal(output.sequences, EXPECTED["folders"][name]["generated"])


@pytest.mark.parametrize("told", [True, False])
def test_drafted_tokens(name, told):
    model, inputs = load(name), single(name)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    if not told:
        model.generation_config.suppress_tokens = None
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=4), expected)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=model), expected)
    assert torch.equal(model.generate(**inputs, **options, assistant_early_exit=1), expected)


def test_right_padding_is_refused(name):
    inputs = inputs_of(name)
    flipped = {key: inputs[key].flip(1) if key != "pixel_values" else inputs[key] for key in inputs}
    with pytest.raises(ValueError, match="ends in padding"):
        load(name).generate(**flipped, **GENERATE)


def test_states_and_weights(name):
    model, inputs = load(name), inputs_of(name)
    length = inputs["input_ids"].shape[1]
    options = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    output = model.generate(**inputs, **GENERATE, **options)
    assert torch.equal(output.sequences, EXPECTED["folders"][name]["generated"])
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        num_new = 1 if step else length
        assert [state.shape for state in states] == [(4, num_new, model.config.hidden_size)] * (layers + 1)
        assert [weight.shape for weight in weights] == [(4, heads, num_new, length + step)] * layers
        torch.testing.assert_close(weights[-1][:, :, -1].sum(-1), torch.ones(4, heads))
    with torch.no_grad():
        logits = model.lm_head(output.hidden_states[0][-1])[..., : model.config.image_token_id]
    torch.testing.assert_close(logits, EXPECTED["folders"][name]["logits"][..., : model.config.image_token_id])


def test_kernels(name):
    assert is_right(name, load(name, attn_implementation="eager"))
    for kernel in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            load(name, attn_implementation=kernel)


def test_half_precision(name):
    for option in ("dtype", "torch_dtype"):
        model = load(name, **{option: torch.bfloat16})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.generate(**inputs_of(name), **GENERATE, repetition_penalty=1.1).shape[0] == 4


def test_gradient_checkpointing(name):
    plain, saving = load(name).train(), load(name).train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(**with_labels(name)).loss.backward()
    for (_, ours), (_, theirs) in zip(saving.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def train(model, inputs, steps=8):
    """Returns the losses of a few steps of AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r"model\.layers\..*_proj"], ids=["all-linear", "names", "pattern"]
)
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM], ids=lambda auto: auto.__name__)
def test_lora_trains_merges_saves_and_loads(name, tmp_path, targets, auto):
    torch.manual_seed(0)
    base = auto.from_pretrained(HERE / name, trust_remote_code=True).train()
    if targets == "all-linear":
        base.gradient_checkpointing_enable()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, lora_alpha=16)
    model = get_peft_model(base, config)
    adapted = {key.split(".lora_")[0] for key, _ in model.named_parameters() if "lora_" in key}
    assert adapted and not any("vision_tower" in key for key in adapted)
    assert any("mm_projector" in key for key in adapted) == (targets == "all-linear")
    losses = train(model, with_labels(name))
    assert losses[-1] < 0.9 * losses[0]

    inputs = inputs_of(name)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(name), tmp_path / "adapter").eval()
    merged = PeftModel.from_pretrained(load(name), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (again, merged, saved):  # merging adds weights in another order: worst seen 2e-5
            torch.testing.assert_close(other(**inputs).logits, expected, rtol=0, atol=2e-3)
    assert torch.equal(again.generate(**inputs, **GENERATE), model.generate(**inputs, **GENERATE))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig], ids=lambda kind: kind.__name__)
def test_learned_prompts(name, kind):
    torch.manual_seed(0)
    model = get_peft_model(load(name), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    losses = train(model, with_labels(name))
    assert losses[-1] < losses[0]
    assert model.generate(**inputs_of(name), **GENERATE).shape[0] == 4


def test_a_frozen_layer_is_adapted_by_nobody(name):
    with pytest.raises(ValueError, match=r"exclude_modules=r'\.\*vision_tower"):
        get_peft_model(load(name), LoraConfig(target_modules=["fc1"]))


def test_trainer(name, tmp_path):
    model = load(name)
    sample = {key: value[0] for key, value in with_labels(name).items()}  # the first prompt has one image
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        gradient_checkpointing=True, report_to=[], save_steps=2, logging_steps=1, use_cpu=True, disable_tqdm=True,
        label_smoothing_factor=0.0, remove_unused_columns=True, bf16=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=[sample] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.model_accepts_loss_kwargs
    again = Trainer(load(name), settings, train_dataset=[sample] * 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (key, ours), (_, theirs) in zip(again.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


MAPS = {
    "tower-on-disk": {"model.vision_tower": "disk"},
    "tower-and-a-layer-on-disk": {"model.vision_tower": "disk", "model.layers.1": "disk"},
    "all-but-the-embedding-on-disk": dict.fromkeys(["model.vision_tower", *PARTS[1:]], "disk"),
}


@pytest.mark.parametrize("places", MAPS)
def test_device_map(name, places, tmp_path):
    devices = dict.fromkeys([*PARTS, "model.vision_tower"], "cpu") | MAPS[places]
    if load(name).config.tie_word_embeddings:
        devices["lm_head"] = devices["model.embed_tokens"]
    model = load(name, device_map=devices, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert is_right(name, model)


@pytest.mark.parametrize("where", ["cpu", "disk", "sequential"])
def test_accelerate(name, where, tmp_path):
    model = load(name)
    if where == "cpu":
        model = accelerate.cpu_offload(model, "cpu")
    elif where == "disk":
        model = accelerate.disk_offload(model, tmp_path, "cpu")
    else:  # layers divided between "devices", each moved to before its turn
        places = ["cpu" if number % 2 else "disk" for number in range(len(PARTS))]
        devices = dict(zip(PARTS, places, strict=True)) | {"model.vision_tower": "disk", "model.embed_tokens": "cpu"}
        if model.config.tie_word_embeddings:
            devices["lm_head"] = "cpu"
        model = accelerate.dispatch_model(model, devices, "cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert is_right(name, model)


def test_no_layer_is_divided(name):
    model = load(name)
    total = sum(parameter.nbytes for parameter in model.parameters())
    ways = set()
    for tenths in range(3, 12):
        room = {"cpu": total * tenths // 10, "disk": 2 * total}
        places = accelerate.infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
        assert all(place.count(".") < 3 for place in places), "model.layers.0 is not divided, nor is the tower"
        assert not [place for place in places if place.startswith("model.vision_tower.")]
        ways.add(frozenset(places.values()))
    assert frozenset({"cpu", "disk"}) in ways


class Step(torch.nn.Module):
    """A step with a static cache, the tensors of which are buffers: what `torch.export` wants."""

    def __init__(self, model, num_samples, num_slots):
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=num_slots)
        heads, dim = model.config.num_key_value_heads, model.config.head_dim
        self.cache.early_initialization(num_samples, heads, dim, model.dtype, "cpu")
        for number, layer in enumerate(self.cache.layers):
            for field in self.fields(layer):
                self.register_buffer(f"{field}_{number}", getattr(layer, field), persistent=False)

    @staticmethod
    def fields(layer):
        return [field for field in ("keys", "values", "cumulative_length") if hasattr(layer, field)]

    def forward(self, input_ids, attention_mask, cache_position, pixel_values=None):
        for number, layer in enumerate(self.cache.layers):
            for field in self.fields(layer):
                setattr(layer, field, getattr(self, f"{field}_{number}"))
        output = self.model(
            input_ids, attention_mask, pixel_values=pixel_values, past_key_values=self.cache,
            cache_position=cache_position,
        )  # fmt: skip
        return output.logits


def decode(name, build_step):
    """Greedy tokens by `build_step(model, first arguments)`, called for the prompt and for what follows."""
    inputs, model = inputs_of(name), load(name)
    num_samples, length = inputs["input_ids"].shape
    step = Step(model, num_samples, length + 8)
    mask = pad(inputs["attention_mask"], (0, 8), value=1)
    prompt = (inputs["input_ids"], mask, torch.arange(length), inputs["pixel_values"])
    with torch.no_grad():
        logits = build_step(Step(model, num_samples, length + 8), prompt)(*prompt)
        real = inputs["attention_mask"].bool()
        expected = EXPECTED["folders"][name]["logits"]
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-4)
        ids = [step(*prompt)[:, -1:].argmax(-1)]
        following = build_step(step, (ids[0], mask, torch.tensor([length])))
        for number in range(7):
            ids.append(following(ids[-1], mask, torch.tensor([length + number])).argmax(-1))
    return torch.cat([inputs["input_ids"], *ids], dim=1)


def test_compile_without_breaks(name):
    torch._dynamo.reset()
    found = decode(name, lambda step, _: torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert torch.equal(found, EXPECTED["folders"][name]["generated"])


def test_export(name):
    found = decode(name, lambda step, arguments: torch.export.export(step, arguments, strict=False).module())
    assert torch.equal(found, EXPECTED["folders"][name]["generated"])


def test_a_whole_pickle(name):
    """What `torch.save(model)` and a process of a pool do."""
    file = io.BytesIO()
    torch.save(load(name), file)
    file.seek(0)
    assert is_right(name, torch.load(file, weights_only=False))
