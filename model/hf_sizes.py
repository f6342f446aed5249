"""Hugging Face models of given sizes, without a folder: for what is counted, and for what is timed."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration


def hf_config(model: ModelConfig) -> SaisaConfig:
    """Returns the configuration of an export of a model; the vocabulary's last id stands for the image.

    `model.config.model_config_from_hf` is the way back.
    """
    v = model.vision
    vision = {
        "model_type": f"{v.type}_vision_model",
        "hidden_size": v.hidden_size,
        "intermediate_size": v.usual_ffn_hidden_size,
        "num_hidden_layers": v.num_layers,
        "num_attention_heads": max(1, v.hidden_size // 64),
        "image_size": v.image_size,
        "patch_size": v.patch_size,
    }
    return SaisaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
        attention_bias=model.qkv_bias,
        tie_word_embeddings=model.tie_embeddings,
        vision_config=vision,
        vision_select_layer=v.select_layer,
        projector_type=model.projector,
        resampler_tokens=model.resampler_tokens,
        architecture=model.architecture,
        block_size=model.block_size,
        frozen_layers=model.frozen_layers,
        cross_attention=model.cross_attention,
        cross_attention_every=model.cross_attention_every,
        image_token_id=model.vocab_size - 1,
    )


class _Features(nn.Module):
    """In the place of an encoder: features of its shape, for no FLOPs."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.shape = (model.vision.num_tokens, model.vision.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns [N, P, C]."""
        return pixels.new_empty(len(pixels), *self.shape)


def count_prefill_flops(model: ModelConfig, num_text: int) -> int:
    """Returns the FLOPs that torch counts in the Hugging Face model as it reads one image and some text.

    The encoder is left out; the vocabulary is for the last position only. Meta tensors have shapes and no values, so
    that nothing is computed and no weight takes memory.
    """
    with torch.device("meta"):
        built = SaisaForConditionalGeneration(hf_config(model))
        ids = torch.zeros(1, model.num_tokens_per_image + num_text, dtype=torch.long)
        pixels = torch.zeros(1, 3, 1, 1)
    built.model.vision_tower = _Features(model)  # pyright: ignore[reportAttributeAccessIssue]
    built.model._check_placeholders = lambda *_: None  # there are no ids to look at
    # As products of matrices: kernels that do both products at once are not counted on every device.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(input_ids=ids, pixel_values=pixels, logits_to_keep=1, use_cache=False)
    return counter.get_total_flops()
