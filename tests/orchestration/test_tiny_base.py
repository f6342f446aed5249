"""The tiny base: short prompts, labels that add up, features that keep what is in a picture."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from data_prep.shapes import BACKGROUND, COLORS, caption, draw_questions, draw_scene, render
from model.import_hf import compose_base
from orchestration.tiny_models import PHRASES, build_tiny_clip, build_tiny_llm, train_tokenizer
from pipeline.data.templates import IGNORE_INDEX, encode_conversation

SYSTEM = PHRASES[0]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(300)]
    texts = [caption(scene) for scene in scenes]
    texts += [f"{q.text} {q.answer}" for scene in scenes for q in draw_questions(rng, scene)]
    build_tiny_llm(train_tokenizer(texts, PHRASES), out / "llm", **SIZES)
    build_tiny_clip(out / "clip")
    return out


def test_a_prompt_is_short_and_any_text_can_be_written(folders: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "llm")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer(SYSTEM).input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer(SYSTEM).input_ids) == 2, "BOS and the sentence"
    assert len(tokenizer(f"{SYSTEM} USER: \nIs there a red shape? ASSISTANT: yes</s>").input_ids) <= 20
    unusual = "Größe 42 \u4e2d\u6587\t!"
    assert tokenizer.decode(tokenizer(unusual, add_special_tokens=False).input_ids) == unusual


def test_labels_are_the_answers_and_their_ends(folders: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "llm")
    values = ["<image>\nIs there a red shape?", "no", "Which color do the shapes have?", "dark blue"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    encoded = encode_conversation(turns, True, "v1", tokenizer)
    learned = [token for token in encoded.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == " no</s> dark blue</s>"


def test_the_folders_are_ordinary_and_import_accepts_them(folders: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folders / "llm")
    assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(folders / "llm"))
    config = compose_base(folders / "llm", folders / "clip", folders / "base")
    assert config.num_hidden_layers == SIZES["num_layers"]
    assert config.num_image_tokens == 64


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny_clip(tmp_path / name, hidden_size=32, seed=seed)
        build_tiny_llm(train_tokenizer(["a b"]), tmp_path / f"llm-{name}", **SIZES, seed=seed)
    assert torch.equal(torch.rand(1), expected)
    for kind in ("", "llm-"):
        a, b, c = ((tmp_path / f"{kind}{name}" / "model.safetensors").read_bytes() for name in "abc")
        assert a == b != c


def test_features_tell_color_and_place_to_a_linear_probe(folders: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(folders / "clip")
    processor = CLIPImageProcessor.from_pretrained(folders / "clip")
    rng = random.Random(1)
    pictures = [render(draw_scene(rng), 64) for _ in range(500)]
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt").pixel_values
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert features.shape == (500, 64, 128)
    assert 0.5 < features.std() < 2.0
    colors, places = patch_colors(pictures), torch.arange(64).expand(500, 64)
    found = probe(features, colors, num_classes=1 + len(COLORS))
    drawn = colors[400:] > 0
    assert (found == colors[400:]).float().mean() > 0.95
    assert (found == colors[400:])[drawn].float().mean() > 0.9, "not by calling everything background"
    assert (probe(features, places, num_classes=64) == places[400:]).float().mean() > 0.95


def patch_colors(pictures: list[Image.Image]) -> torch.Tensor:
    """int64[N, 64]: the colour at the middle of each patch of 8 x 8 pixels, 0 for the background."""
    middles = torch.from_numpy(np.stack([np.asarray(picture)[4::8, 4::8] for picture in pictures])).flatten(1, 2)
    palette = torch.tensor([BACKGROUND, *COLORS.values()])
    return (middles[:, :, None] == palette).all(-1).int().argmax(-1)


def probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Returns what a ridge regression fitted on the first 400 pictures says about the patches of the others."""
    x = torch.cat([features, torch.ones_like(features[..., :1])], -1).double()
    fit, wanted = x[:400].flatten(0, 1), torch.nn.functional.one_hot(labels[:400].flatten(), num_classes).double()
    penalty = 1e-3 * len(fit) * torch.eye(fit.shape[1], dtype=torch.double)
    return (x[400:] @ torch.linalg.solve(fit.T @ fit + penalty, fit.T @ wanted)).argmax(-1)
