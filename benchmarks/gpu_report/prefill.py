"""An export and transformers' own LLaVA with the same language model and encoder, both with made-up weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from model.compute import compute_dtype
from model.config import ComputeConfig, ModelConfig
from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration


def build_models(model: ModelConfig, compute: ComputeConfig, device: torch.device) -> dict[str, PreTrainedModel]:
    """Returns both models on the device; the last id of the vocabulary stands for an image's token."""
    v = model.vision
    text: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
    }
    vision = CLIPVisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.usual_ffn_hidden_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=max(1, v.hidden_size // 64),
        image_size=v.image_size,
        patch_size=v.patch_size,
    )
    image = model.vocab_size - 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(compute))
    try:
        with device:
            llava = LlavaConfig(vision, LlamaConfig(**text), image_token_index=image, vision_feature_layer=-2)
            saisa = SaisaConfig(**text, vision_config=vision, image_token_id=image)
            models: dict[str, PreTrainedModel] = {
                "saisa": SaisaForConditionalGeneration(saisa),
                "llava": LlavaForConditionalGeneration(llava),
            }
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in (parameter for built in models.values() for parameter in built.parameters()):
            parameter.normal_(std=0.02)
    return {name: built.eval().requires_grad_(False) for name, built in models.items()}


def prompt(
    model: ModelConfig, num_prompts: int, num_text: int, compute: ComputeConfig, device: torch.device
) -> dict[str, Tensor]:
    """Returns prompts of equal length with an image each, a few tokens behind their beginning."""
    v, image, begin = model.vision, model.vocab_size - 1, 5
    ids = torch.randint(3, image, (num_prompts, num_text + v.num_tokens), device=device)
    ids[:, begin : begin + v.num_tokens] = image
    pixels = torch.randn(num_prompts, 3, v.image_size, v.image_size, device=device, dtype=compute_dtype(compute))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
