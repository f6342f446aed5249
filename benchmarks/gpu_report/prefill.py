"""An export and transformers' own LLaVA with the same language model and encoder, both with made-up weights."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig, PreTrainedModel

from model.compute import compute_dtype
from model.config import ComputeConfig, ModelConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf_sizes import hf_config
from model.llava_folder import LANGUAGE_MODEL_FIELDS


def build_models(model: ModelConfig, compute: ComputeConfig, device: torch.device) -> dict[str, PreTrainedModel]:
    """Returns both models on the device; the last id of the vocabulary stands for an image's token."""
    return {
        "saisa": made_up(SaisaForConditionalGeneration, hf_config(model), compute, device),
        "llava": made_up(LlavaForConditionalGeneration, llava_config(model), compute, device),
    }


def llava_config(model: ModelConfig) -> LlavaConfig:
    """Returns the configuration of transformers' LLaVA of a model's sizes."""
    ours = hf_config(model)
    text = LlamaConfig(**{name: getattr(ours, name) for name in (*LANGUAGE_MODEL_FIELDS, "attention_bias")})
    return LlavaConfig(
        ours.vision_config,
        text,
        image_token_index=ours.image_token_id,
        vision_feature_layer=ours.vision_select_layer,
        vision_feature_select_strategy="default" if model.vision.type == "clip" else "full",
    )


def made_up(
    kind: type[PreTrainedModel], config: PretrainedConfig, compute: ComputeConfig, device: torch.device
) -> PreTrainedModel:
    """Returns a model on the device with made-up weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(compute))
    try:
        with device:
            built = kind(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.02)
    return built.eval().requires_grad_(False)


def prompt(
    model: ModelConfig, num_prompts: int, num_text: int, compute: ComputeConfig, device: torch.device
) -> dict[str, Tensor]:
    """Returns prompts of equal length with an image each, a few tokens behind their beginning."""
    v, image, begin = model.vision, model.vocab_size - 1, 5
    ids = torch.randint(3, image, (num_prompts, num_text + v.num_tokens), device=device)
    ids[:, begin : begin + v.num_tokens] = image
    pixels = torch.randn(num_prompts, 3, v.image_size, v.image_size, device=device, dtype=compute_dtype(compute))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
