"""What a processor takes and refuses on the pinned transformers; `make test-hf` asks the same of both versions."""

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlavaProcessor

from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_folder import write_hf_folder
from model.hf_source import read_checkpoint
from model.import_hf import compose_base
from pipeline.data.templates import TEMPLATES, chat_template
from tests.hf_compat.make_folder import make_export, make_large_vocabulary, random_projectors
from tests.hf_compat.tiny import save_llm, save_vision
from tests.transformers_versions import CLIPImageProcessor

TEXTS = ["USER: How many shapes are there? ASSISTANT:", "USER: Why?", "The"]
QUESTION = {"type": "text", "text": "What is on the left?"}
INPUTS: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processing")
    make_export(out / "work", out / "export", "llama", "clip", "mlp")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(out / "photo.png")
    return out / "export"


@pytest.fixture
def processor(folder: Path) -> SaisaProcessor:
    return SaisaProcessor.from_pretrained(folder)


@pytest.fixture
def photo(folder: Path) -> Path:
    return folder.parent / "photo.png"


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_every_way_to_write_an_image_part(processor: SaisaProcessor, photo: Path) -> None:
    text = base64.b64encode(photo.read_bytes()).decode()
    right = processor(images=Image.open(photo), text="<image> x", return_tensors="pt")["pixel_values"]
    prompt = processor.apply_chat_template(asked({"type": "image"}, QUESTION), add_generation_prompt=True)
    assert prompt.count("<image>") == 1
    images: list[dict[str, Any]] = [
        {"image": photo}, {"image": np.asarray(Image.open(photo)), "url": None}, {"url": photo.as_uri()},
        {"path": str(photo)}, {"base64": text}, {"base64": f"data:image/png;base64,{text}"},
    ]  # fmt: skip
    urls: list[Any] = [{"url": photo.as_uri()}, {"url": f"data:image/png;base64,{text}"}, str(photo)]
    parts = [{"type": "image"} | image for image in images]
    parts += [{"type": "image_url", "image_url": url} for url in urls]
    for part in parts:
        messages = asked(part, QUESTION)
        inputs = processor.apply_chat_template(messages, **INPUTS)
        assert inputs["input_ids"].tolist() == [processor.tokenize(prompt)], part
        assert torch.equal(inputs["pixel_values"], right), part
        assert messages == asked(part, QUESTION), "the caller's messages stay as they are"


def test_pixels_of_messages_equal_llavas(processor: SaisaProcessor, tmp_path: Path) -> None:
    """In transformers LLaVA has a processor of its own. A square image needs no padding, so pixels are equal."""
    square = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))
    square.save(tmp_path / "square.png")
    name, pixels = str(tmp_path / "square.png"), np.asarray(square)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    llava = LlavaProcessor(
        CLIPImageProcessor(**sizes), processor.tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=processor.chat_template,
    )  # fmt: skip
    text = base64.b64encode(Path(name).read_bytes()).decode()
    images: list[dict[str, Any]] = [
        {"image": square}, {"image": name}, {"image": pixels}, {"image": torch.from_numpy(pixels.transpose(2, 0, 1))},
        {"url": name}, {"path": name}, {"base64": text}, {"url": f"data:image/png;base64,{text}"},
    ]  # fmt: skip
    for image in images:
        messages = asked({"type": "image"} | image, QUESTION)
        theirs: Any = llava.apply_chat_template(messages, **INPUTS)
        found = processor.apply_chat_template(messages, **INPUTS)
        assert torch.equal(found["pixel_values"], theirs["pixel_values"]), image
        assert (found["input_ids"] == processor.image_token_id).sum() == 4


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}, "part {'type': 'video'.* text and image"),
        ({"role": "user", "content": [{"type": "audio_url"}]}, "part {'type': 'audio_url'}; .* text and image"),
        ({"role": "user", "content": [{"text": "x"}]}, "part {'text': 'x'}; "),
        ({"role": "user", "content": ["x"]}, "part 'x'; "),
        ({"role": "user", "content": None}, "content of a message is None; give a text or a list of parts"),
        ({"role": "user"}, "a message is {'role': 'user'}; give {'role'"),
        ("x", "a message is 'x'; give"),
    ],
)
def test_other_messages_are_refused_by_name(processor: SaisaProcessor, message: Any, complaint: str) -> None:
    for options in ({}, INPUTS):
        with pytest.raises(ValueError, match=complaint) as error:
            processor.apply_chat_template([message], **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_read_texts_and_lists_alike(processor: SaisaProcessor, name: str) -> None:
    """Through the tokenizer, where no code of ours looks at the messages."""
    tokenizer, words = processor.tokenizer, {"chat_template": chat_template(name), "tokenize": False}
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "<image>\nWhy?"}], **words)
    for kind in ("image", "image_url"):
        parts = [{"type": kind, kind: "x"}, {"type": "text", "text": "Why?"}]
        assert tokenizer.apply_chat_template(asked(*parts), **words) == plain
    for kind in ("video", "audio"):
        with pytest.raises(Exception, match=f"a part of type {kind}; this model reads parts of type text and image"):
            tokenizer.apply_chat_template(asked({"type": kind, "text": "Why?"}), **words)


def test_base64_is_never_the_name_of_a_file(processor: SaisaProcessor, photo: Path) -> None:
    with pytest.raises(ValueError, match="no image there"):
        processor.apply_chat_template(asked({"type": "image", "base64": str(photo)}), **INPUTS)


def test_empty_videos_and_audios_are_nothing(processor: SaisaProcessor, photo: Path) -> None:
    plain = processor(images=photo, text="<image> x")["input_ids"]
    assert processor([photo], ["<image> x"], videos=[], audios=[])["input_ids"] == plain
    assert processor(images=photo, text="<image> x", videos=None, audio=[[]])["input_ids"] == plain
    for name in ("videos", "audio", "audios"):
        given: dict[str, Any] = {name: [np.zeros(4)]}
        with pytest.raises(ValueError, match=f"{name} was given, but this model reads text and images only"):
            processor(text="x", **given)
    with pytest.raises(TypeError, match="text must be a text or a list of texts"):
        processor("<image> x", [photo])  # pyright: ignore[reportArgumentType]


def test_batches_are_padded_for_generation(folder: Path, processor: SaisaProcessor) -> None:
    """Padded on the right, the answers to the shorter prompts would go on from padding."""
    model = SaisaForConditionalGeneration.from_pretrained(folder).eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for pad in (processor.tokenizer, AutoTokenizer.from_pretrained(folder), lambda t, **o: processor(text=t, **o)):
        batch = pad(TEXTS, padding=True, return_tensors="pt")
        found = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for row, text in enumerate(TEXTS):
            single = processor(text=text, return_tensors="pt")
            assert torch.equal(model.generate(**single, **options)[0, single["input_ids"].shape[1] :], found[row])
    right = processor(text=TEXTS, padding=True, padding_side="right", return_tensors="pt")
    with pytest.raises(ValueError, match="ends in padding, .* padding_side='left'"):
        model.generate(**right, **options)
    processor.tokenizer.padding_side = "right"
    assert torch.equal(processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"], right["input_ids"])


def test_a_folder_made_from_an_older_base_pads_left_too(folder: Path, tmp_path: Path) -> None:
    processor = SaisaProcessor.from_pretrained(folder, padding_side="right")
    assert processor.tokenizer.padding_side == "right", "as in bases of before"
    config, tensors = SaisaConfig.from_pretrained(folder), read_checkpoint(folder)
    write_hf_folder(tmp_path / "export", config, tensors, processor.tokenizer, processor.image_processor)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").padding_side == "left"


def test_an_export_says_where_its_answers_end(tmp_path: Path) -> None:
    """By the tokenizer's EOS too: lmms-eval stops there only. A base keeps the EOS that training knows."""
    save_llm(tmp_path / "llm", "llama_3")
    save_vision(tmp_path / "vision", "clip")
    compose_base(tmp_path / "llm", tmp_path / "vision", tmp_path / "base", stop_token="<|eot_id|>")
    base = SaisaProcessor.from_pretrained(tmp_path / "base")
    assert base.tokenizer.eos_token == "<|end|>"
    config, parts = SaisaConfig.from_pretrained(tmp_path / "base"), (base.tokenizer, base.image_processor)
    tensors = [*read_checkpoint(tmp_path / "base"), *random_projectors(config)]
    write_hf_folder(tmp_path / "export", config, tensors, *parts, stop_token="<|eot_id|>")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.eos_token == "<|eot_id|>" and base.tokenizer.eos_token == "<|end|>"
    text = "<|begin|>a<|eot_id|><|end|>"
    assert tokenizer(text).input_ids == base.tokenizer(text).input_ids
    ends = GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id
    assert ends == sorted(base.tokenizer.convert_tokens_to_ids(["<|end|>", "<|eot_id|>"]))


def test_a_large_vocabulary_brings_no_false_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From 4.57.3 to 4.57.6 transformers would take it for Mistral's and advise to change how it splits text."""
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        make_large_vocabulary(tmp_path / "work", tmp_path / "base")
        assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) > 100_000
        config = AutoConfig.from_pretrained(tmp_path / "base", trust_remote_code=True)
        config.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tmp_path / "base")
    transformers.logging.disable_propagation()
    assert "regex" not in caplog.text
