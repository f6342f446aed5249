"""What other people's code hands a processor, and what it must get back: the rows of docs/huggingface.md.

Runs beside the folders of `make_folder.py`, as `check_folder.py` does. The right pixels and answers come from PNG files
and single prompts; every other form and every batch must give the same.
"""

import base64
import functools
import http.server
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

HERE = Path(__file__).parent
EXPECTED = torch.load(HERE / "expected.pt", weights_only=False)
TRUST = {"trust_remote_code": True}
FOLDERS = [HERE / name for name in EXPECTED["folders"]]
GENERATE = EXPECTED["generate"]
FILE = HERE / "1.png"
QUESTIONS = ["What is the colour of the square?", "How many?", "What is on the left, and what is below it?", "Why?"]
TEXTS = ["USER: How many shapes are there? ASSISTANT:", "USER: Why?", "The", "A chat between a curious user and"]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder, **TRUST)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, **TRUST).eval()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    """The folder of the images, on a server of this machine."""
    handler = functools.partial(QuietHandler, directory=str(HERE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def chat(question, *images):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


CHATS = [
    chat(QUESTIONS[0], str(HERE / "0.png")),
    chat(QUESTIONS[1], str(FILE)),
    chat(QUESTIONS[2], str(HERE / "2.png"), str(HERE / "3.png")),
    chat(QUESTIONS[3], str(HERE / "4.png")),
]
MESSAGE_INPUTS = {
    "add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"
}  # fmt: skip


def answer(model, processor, messages):
    """Returns what the model says to one chat, by the processor and `generate` alone."""
    inputs = processor.apply_chat_template(messages, **MESSAGE_INPUTS)
    ids = model.generate(**inputs, **GENERATE)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def build_pipeline(folder) -> Any:
    return transformers.pipeline("image-text-to-text", model=str(folder), device="cpu", trust_remote_code=True)


def test_pipeline_answers_a_batch_as_one_by_one(folder, model, processor):
    pipe = build_pipeline(folder)
    options = {"return_full_text": False, "generate_kwargs": GENERATE}
    said = [answer(model, processor, messages) for messages in CHATS]
    assert len(set(said)) > 2, "answers that differ, or the comparison is worth nothing"
    for size in (1, 4):
        found = pipe(CHATS, batch_size=size, **options)
        assert [row[0]["generated_text"] for row in found] == said
    whole = pipe(CHATS[0], generate_kwargs=GENERATE)[0]["generated_text"]
    assert whole[-1] == {"role": "assistant", "content": said[0]}


def test_tokenizer_alone_pads_for_generation(folder, model, processor):
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(folder)):
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        found = model.generate(**batch, **GENERATE)[:, batch["input_ids"].shape[1] :]
        for row, text in enumerate(TEXTS):
            single = tokenizer(text, return_tensors="pt")
            ids = model.generate(**single, **GENERATE)[0, single["input_ids"].shape[1] :]
            assert torch.equal(ids, found[row]), text


def test_processor_pads_for_generation(model, processor):
    inputs = processor(text=TEXTS, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, -1].tolist() == [1] * 4 and not inputs["attention_mask"].all()
    other = processor(text=TEXTS, padding=True, padding_side="right", return_tensors="pt")
    assert other["attention_mask"][:, 0].tolist() == [1] * 4, "training may want it"
    processor.tokenizer.padding_side = "right"
    assert torch.equal(processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"], other["input_ids"])


def test_generation_from_right_padding_is_refused(model, processor):
    inputs = processor(text=TEXTS, padding=True, padding_side="right", return_tensors="pt")
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(**inputs, **GENERATE)


def test_padding_side_outlives_saving(folder, processor):
    target = HERE / f"processor-{transformers.__version__}" / folder.name
    processor.save_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).padding_side == "left"


PIXELS = np.asarray(Image.open(FILE))
BASE64 = base64.b64encode(FILE.read_bytes()).decode()
FORMS = {
    "Pillow": Image.open(FILE),
    "path": str(FILE),
    "pathlib": FILE,
    "file URL": FILE.as_uri(),
    "data URL": f"data:image/png;base64,{BASE64}",
    "base64": BASE64,
    "base64 in lines": base64.encodebytes(FILE.read_bytes()).decode(),
    "bytes": FILE.read_bytes(),
    "uint8 HWC": PIXELS,
    "uint8 CHW": PIXELS.transpose(2, 0, 1),
    "float 0..1": PIXELS.astype(np.float32) / 255,
    "float 0..255": PIXELS.transpose(2, 0, 1).astype(np.float64),
    "int64": PIXELS.astype(np.int64),
    "torch CHW": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "torch float": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255,
}


def right_pixels(folder):
    return EXPECTED["folders"][folder.name]["inputs"]["pixel_values"][1:2]


@pytest.mark.parametrize("form", [*FORMS, "http"])
def test_forms_of_an_image(folder, processor, url, form):
    image = f"{url}/1.png" if form == "http" else FORMS[form]
    by_processor = processor(images=image, text="<image>\nWhat?", return_tensors="pt")
    by_message = processor.apply_chat_template(chat("What?", image), **MESSAGE_INPUTS)
    alone = AutoImageProcessor.from_pretrained(folder, **TRUST)(image, return_tensors="pt")
    for inputs in (by_processor, by_message, alone):
        assert torch.equal(inputs["pixel_values"], right_pixels(folder))


def parts(url):
    """The ways to write an image part, as in transformers' and OpenAI's chats."""
    return [
        {"type": "image", "url": f"{url}/1.png"},
        {"type": "image", "url": FILE.as_uri()},
        {"type": "image", "path": str(FILE)},
        {"type": "image", "path": FILE},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "image": FORMS["torch CHW"], "url": None},
        {"type": "image_url", "image_url": {"url": f"{url}/1.png", "detail": "high"}},
        {"type": "image_url", "image_url": {"url": FILE.as_uri()}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image_url", "image_url": f"{url}/1.png"},
    ]


def test_image_parts(folder, processor, url):
    prompt = processor.apply_chat_template(chat("What?", FILE), add_generation_prompt=True)
    for part in parts(url):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
        inputs = processor.apply_chat_template(messages, **MESSAGE_INPUTS)
        assert inputs["input_ids"].tolist() == [processor.tokenize(prompt)], part
        assert torch.equal(inputs["pixel_values"], right_pixels(folder)), part
        assert messages[0]["content"][0] is part, "the caller's messages stay as they are"


def test_pipeline_takes_openai_messages(folder, model, processor, url):
    pipe = build_pipeline(folder)
    part = {"type": "image_url", "image_url": {"url": f"{url}/1.png"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTIONS[1]}]}]
    found = pipe(messages, return_full_text=False, generate_kwargs=GENERATE)[0]["generated_text"]
    assert found == answer(model, processor, CHATS[1])


def test_several_chats_at_once(folder, processor):
    batch = processor.apply_chat_template(CHATS, **MESSAGE_INPUTS, **padding())
    assert batch["pixel_values"].shape[0] == 5
    for row, messages in enumerate(CHATS):
        single = processor.apply_chat_template(messages, **MESSAGE_INPUTS)["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, -len(single) :], single)


def padding():
    """How `apply_chat_template` is told to pad: transformers 5 warns of the way of 4.57."""
    return {"padding": True} if transformers.__version__.startswith("4") else {"processor_kwargs": {"padding": True}}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "video", "path": "a.mp4"}, "'type': 'video'"),
        ({"type": "audio", "audio": "a.wav"}, "'type': 'audio'"),
        ({"type": "input_text", "text": "a"}, "'type': 'input_text'"),
        ({"text": "no type"}, "'text': 'no type'"),
        ({"type": "text"}, "'type': 'text'"),
        ("bare", "'bare'"),
    ],
)
def test_other_parts_are_refused_by_name(processor, part, named):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    for options in ({}, MESSAGE_INPUTS):
        with pytest.raises(ValueError, match=f"part .*{named}.*text and image"):
            processor.apply_chat_template(messages, **options)
    if isinstance(part, dict) and part.get("type") in ("video", "audio"):  # the template alone says so too
        with pytest.raises(Exception, match=f"type {part['type']}; .*text and image"):
            processor.tokenizer.apply_chat_template(messages, tokenize=False)


def test_base64_is_never_the_name_of_a_file(processor):
    messages = [{"role": "user", "content": [{"type": "image", "base64": str(FILE)}]}]
    with pytest.raises(ValueError, match="no image there"):
        processor.apply_chat_template(messages, **MESSAGE_INPUTS)


@pytest.mark.parametrize("image", ["missing.png", "file:///missing.png", "data:image/png;base64,AAAA", "QUFBQQ=="])
def test_what_is_no_image_is_named(processor, image):
    with pytest.raises(ValueError, match=image.split(",")[0]):
        processor(images=image, text="<image> x")


def test_empty_videos_and_audios_are_nothing(processor):
    plain = processor(text="<image> x", images=FILE)["input_ids"]
    for nothing in ({"videos": [], "audios": []}, {"videos": None, "audio": None}, {"audio": [], "videos": [[]]}):
        assert processor(text="<image> x", images=[FILE], **nothing)["input_ids"] == plain
    assert processor([FILE], ["<image> x"])["input_ids"] == plain, "images first, as in other processors"
    for name in ("videos", "audio", "audios"):
        with pytest.raises(ValueError, match=f"{name} was given, .* text and images only"):
            processor(text="x", **{name: [np.zeros(4)]})


def test_auto_model(folder, model):
    """The class that lmms-eval asks for."""
    found = AutoModel.from_pretrained(folder, **TRUST).eval()
    assert type(found).__name__ == type(model).__name__
    numbers = EXPECTED["folders"][folder.name]
    with torch.no_grad():
        torch.testing.assert_close(found(**numbers["inputs"]).logits, numbers["logits"], rtol=0, atol=1e-4)


def test_large_vocabularies_load_without_false_advice(caplog, folder):
    """A base whose vocabulary exceeds 100,000 tokens, and what each version saves of it."""
    base = HERE / "large-vocabulary"
    saved = HERE / f"large-vocabulary-{transformers.__version__}"
    if not saved.exists():
        AutoProcessor.from_pretrained(base, **TRUST).save_pretrained(saved)
        transformers.AutoConfig.from_pretrained(base, **TRUST).save_pretrained(saved)
        for file in base.glob("*.py"):
            shutil.copyfile(file, saved / file.name)
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            assert len(AutoTokenizer.from_pretrained(base)) > 100_000
            assert AutoTokenizer.from_pretrained(saved)("eBay").input_ids
    finally:
        transformers.logging.disable_propagation()
    assert "regex" not in caplog.text
