"""Makes tiny random exports, with the answers they must give: `python -m tests.hf_compat.make_folder OUT`.

The `check_*.py`, which come along, then run in other environments, where nothing of this repository is on the path.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_folder import PROJECTOR, weight_shapes, write_hf_folder
from model.hf_read import load_config
from model.hf_source import read_checkpoint
from model.import_hf import compose_base
from model.llava_hf_folder import write_llava_hf
from pipeline.data.templates import chat_template
from tests.hf_compat.tiny import save_byte_level, save_llm, save_vision

KINDS = {"llama-clip": ("llama", "clip", "mlp"), "qwen2-siglip": ("qwen2", "siglip", "linear")}
LLAVAS = {"llava-llama-clip": ("llama", "clip", "mlp"), "llava-qwen2-siglip": ("qwen2", "siglip", "mlp")}
TEXTS = [
    "<image>\nWhat is the colour of the square?",
    "How many shapes are there?",
    "USER: One <image> and  two <image>, three<image> on the left? ASSISTANT: The",
    "<image><image>\nThere are",
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "What is on the left?"}]},
    {"role": "assistant", "content": "The square."},
    {"role": "user", "content": [{"type": "text", "text": "And the colour?"}]},
]
GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def random_projectors(config: SaisaConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields random projector weights for every layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in weight_shapes(config, is_base=False).items():
        if PROJECTOR in name:
            yield name, torch.randn(shape, generator=generator) * 0.3


def make_export(
    work: Path,
    out: Path,
    llm: str,
    vision: str,
    projector: str,
    dtype: torch.dtype | None = None,
    architecture: str = "saisa",
) -> SaisaConfig:
    """Returns the configuration of an export, made of a base as training would make it, but with random projectors."""
    save_llm(work / "llm", llm)
    save_vision(work / "vision", vision)
    words = chat_template("v1")
    config = compose_base(work / "llm", work / "vision", work / "base", chat_template=words, projector_type=projector)
    config.architecture = architecture
    processor = SaisaProcessor.from_pretrained(work / "base")
    tensors = [*read_checkpoint(work / "base"), *random_projectors(config)]
    write_hf_folder(
        out, config, tensors, processor.tokenizer, processor.image_processor, words, dtype=dtype, max_shard_bytes=60_000
    )
    return config


def make_llava(work: Path, out: Path, kinds: tuple[str, str, str], images: list[str]) -> dict[str, Any]:
    """Writes a LLaVA for transformers' own classes; returns what ours, with the same weights, says."""
    make_export(work, ours := work / "ours", *kinds, architecture="llava")
    model = SaisaForConditionalGeneration.from_pretrained(ours).eval()
    processor = SaisaProcessor.from_pretrained(ours)
    words = processor.chat_template
    write_llava_hf(out, load_config(ours), read_checkpoint(ours), processor.tokenizer, processor.image_processor, words)
    inputs = processor(text=TEXTS, images=images, padding=True, return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image", "path": images[1]}, *MESSAGES[0]["content"][1:]]}]
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages, **asked)
    with torch.no_grad():
        logits = model(**inputs).logits
    return {
        "inputs": dict(inputs),
        "logits": logits,
        "generated": model.generate(**inputs, **GENERATE),
        "prompt_ids": prompt["input_ids"][0].tolist(),
        "pixels": prompt["pixel_values"],
    }


def make_large_vocabulary(work: Path, out: Path) -> None:
    """Writes a base with more than 100,000 tokens, as one of Llama-3 or Qwen2 has."""
    save_llm(work / "llm", "llama_3", vocab_size=100_384, num_hidden_layers=1)
    save_byte_level(work / "llm", adds_bos=True, num_unused=100_000)
    save_vision(work / "vision", "clip")
    compose_base(work / "llm", work / "vision", out, chat_template=chat_template("llama_3"))


def main(out: Path) -> None:
    """Writes exports, images, and `expected.pt`."""
    out.mkdir(parents=True)
    for number in range(6):
        noise = torch.randint(0, 256, (20 + 7 * number, 40, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(out / f"{number}.png")
    images = [str(out / f"{number}.png") for number in range(6)]
    expected: dict[str, Any] = {"texts": TEXTS, "messages": MESSAGES, "generate": GENERATE, "folders": {}}
    for name, kinds in KINDS.items():
        make_export(out / "work" / name, out / name, *kinds)
        model = SaisaForConditionalGeneration.from_pretrained(out / name).eval()
        processor = SaisaProcessor.from_pretrained(out / name)
        inputs = processor(text=TEXTS, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        expected["folders"][name] = {
            "inputs": dict(inputs),
            "logits": logits,
            "generated": model.generate(**inputs, **GENERATE),
            "prompt": prompt,
            "prompt_ids": processor.tokenize(prompt),
            "names": sorted(weight_shapes(model.config, is_base=False)),
        }
    expected["llavas"] = {
        name: make_llava(out / "work" / name, out / name, kinds, images) for name, kinds in LLAVAS.items()
    }
    make_large_vocabulary(out / "work" / "large", out / "large-vocabulary")
    shutil.rmtree(out / "work")
    torch.save(expected, out / "expected.pt")
    for file in Path(__file__).parent.glob("check_*.py"):
        shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
