"""Does a LLaVA that `make export FORMAT=llava-hf` writes load as transformers' own, with no code but theirs?"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

HERE = Path(__file__).parent
EXPECTED = torch.load(HERE / "expected.pt", weights_only=False)
IMAGES = [str(HERE / f"{number}.png") for number in range(6)]


@pytest.fixture(params=list(EXPECTED["llavas"]))
def name(request):
    return request.param


def test_a_folder_is_weights_and_settings_alone(name):
    assert not list((HERE / name).glob("*.py")) and "auto_map" not in (HERE / name / "config.json").read_text()
    assert not any(module.startswith("transformers_modules") for module in sys.modules if "llava" in module)


@pytest.mark.parametrize("auto", [LlavaForConditionalGeneration, AutoModelForImageTextToText], ids=lambda c: c.__name__)
def test_logits_and_answers(name, auto):
    model, numbers = auto.from_pretrained(HERE / name).eval(), EXPECTED["llavas"][name]
    assert type(model) is LlavaForConditionalGeneration
    inputs = numbers["inputs"]
    image = model.config.image_token_id
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != image)
    said = torch.arange(numbers["logits"].shape[-1]) != image
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[text][:, said], numbers["logits"][text][:, said], rtol=0, atol=1e-4)
    generated: Any = model.generate(**inputs, **EXPECTED["generate"])
    assert torch.equal(generated, numbers["generated"])


def test_its_processor_asks_as_training_did(name):
    processor, numbers = AutoProcessor.from_pretrained(HERE / name), EXPECTED["llavas"][name]
    assert type(processor).__name__ == "LlavaProcessor"
    question = [{"type": "image", "path": IMAGES[1]}, *EXPECTED["messages"][0]["content"][1:]]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["input_ids"].tolist() == [numbers["prompt_ids"]]
    # Whichever library resizes, rounding differs by a level or two of 255; a wrong crop or padding by a hundred.
    assert (inputs["pixel_values"] - numbers["pixels"]).abs().max() < 0.1
