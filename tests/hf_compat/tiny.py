"""Tiny random checkpoints in the formats that people download: language models, encoders, tokenizers."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is the colour of the square on the left? ASSISTANT: The square is red and the circle is blue.",
    "How many shapes are there? There are three shapes, two of them are green.",
] * 4
VOCAB = 384
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "vocab_size": VOCAB,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Returns the model with every parameter random, biases and norms too, so that a test can miss none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def save_llm(folder: Path, kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random language model, saved with a tokenizer of its family: llama, mistral, qwen2 or llama_3."""
    configs = {"llama": LlamaConfig, "llama_3": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    classes = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    extra = {"mistral": {"sliding_window": None}, "qwen2": {"tie_word_embeddings": True, "rope_theta": 1e6}}
    extra["llama_3"] = {"rope_theta": 500000.0}
    config = configs[kind](**SIZES | extra.get(kind, {}) | {"bos_token_id": 1, "eos_token_id": 2} | changes)
    model = randomise(classes[kind.removesuffix("_3")](config), seed)
    model.save_pretrained(folder)
    save_sentencepiece(folder) if kind in ("llama", "mistral") else save_byte_level(folder, adds_bos=kind == "llama_3")
    return model


def save_vision(folder: Path, kind: str, seed: int = 1) -> PreTrainedModel:
    """Returns a random encoder, saved with its image processor: clip (both towers), clip_vision_model or siglip."""
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model: PreTrainedModel = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=VISION))
    elif kind == "clip_vision_model":
        model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**VISION))
    randomise(model, seed).save_pretrained(folder)
    size = VISION["image_size"]
    if kind == "siglip":
        SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    else:
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
            folder
        )
    return model


def save_sentencepiece(folder: Path, **changes: Any) -> None:
    """Writes a tokenizer as Vicuna and Mistral ship theirs: a sentencepiece model and settings.

    With `legacy`, which transformers 4.57 and 5 understand differently.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))


def save_byte_level(folder: Path, adds_bos: bool, num_unused: int = 0) -> None:
    """Writes a tokenizer as Llama-3 (with BOS) and Qwen2 (without) ship theirs: byte-level BPE.

    `num_unused` tokens that no text has make the vocabulary as large as theirs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    if num_unused:
        state = json.loads(tokenizer.to_str())
        vocab = state["model"]["vocab"]
        vocab |= {f"unused-{number}": len(vocab) + number for number in range(num_unused)}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    if adds_bos:
        post = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
        tokenizer.post_processor = post  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>" if adds_bos else None, eos_token="<|end|>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    fast.save_pretrained(folder)
