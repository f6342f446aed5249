"""SAISA for inference: visual tokens never ask, they only answer (arXiv 2502.02458).

The residual stream holds **text only**. Layer i shows its text tokens the visual tokens V_i = MLP_i(Z), made straight
from the vision encoder's features Z, as keys and values:

    x, u  = RMSNorm_i(T_i), RMSNorm_i(V_i)     the layer's own input norm, on both
    Q     = x W_Q                              text only
    K, Vv = [u; x] W_K, [u; x] W_V             visual and text, in position order
    H_i   = Attention(Q, K, Vv) W_O + T_i      text only
    T_i+1 = FFN_i(RMSNorm(H_i)) + H_i          text only

`input_ids` hold one `image_token_id` per visual token, so a position in `input_ids`, a slot of the key/value cache and
a position in the rotary embedding are the same thing. For one image of v = 2 visual tokens between the texts `a` and
`b c`, the keys each query may see are

    slot     0 1 2 3 4
             a I I b c
    query a  1 . . . .
    query b  1 1 1 1 .
    query c  1 1 1 1 1      and nobody asks from slots 1 and 2

Dims: B samples, S slots (visual and text), T text rows (the most that a sample has), M keys (cached and new), N images,
P visual tokens an image, C vision width, D hidden, Q query heads, G key/value heads, H head dim, V vocabulary.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_saisa import SaisaConfig
from .vision_saisa import VisionTower

IGNORE_INDEX = -100


class Slots(NamedTuple):
    """Where the rows of a step stand: which slots are visual, and the slot of every text row.

    Samples with fewer text rows than the longest borrow visual slots to fill up. What such a row computes is finite
    and never read: its keys are overwritten by the visual ones and its output by zeros.
    """

    visual_BS: Tensor
    text_BT: Tensor | None  # None: every slot is text, T = S

    @classmethod
    def find(cls, visual_BS: Tensor, has_images: bool) -> "Slots":
        """Returns the layout; text slots come first in a stable sort by "is visual"."""
        if not has_images:
            return cls(visual_BS, None)
        num_rows = int((~visual_BS).sum(dim=1).max())
        return cls(visual_BS, visual_BS.int().argsort(dim=1, stable=True)[:, :num_rows])

    def gather(self, slots_BS: Tensor) -> Tensor:
        """Returns the text rows [B, T, ...] of something [B, S, ...]."""
        if self.text_BT is None:
            return slots_BS
        index = self.text_BT.view(*self.text_BT.shape, *[1] * (slots_BS.dim() - 2))
        return slots_BS.gather(1, index.expand(-1, -1, *slots_BS.shape[2:]))

    def merge(self, text_BTD: Tensor, visual_ND: Tensor | float) -> Tensor:
        """Returns [B, S, D] with text rows and visual tokens in their slots."""
        if self.text_BT is None:
            return text_BTD
        (num_samples, _, width), num_slots = text_BTD.shape, self.visual_BS.shape[1]
        index = self.text_BT[..., None].expand(-1, -1, width)
        merged_BSD = text_BTD.new_zeros(num_samples, num_slots, width).scatter(1, index, text_BTD)
        if isinstance(visual_ND, Tensor):
            return merged_BSD.masked_scatter(self.visual_BS[..., None], visual_ND.to(text_BTD.dtype))
        return merged_BSD.masked_fill(self.visual_BS[..., None], visual_ND)


class SaisaRMSNorm(nn.Module):
    """RMSNorm, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` scaled to a mean square of 1, times the weight."""
        x_fp32 = x.float()
        return self.weight * (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Returns cosines and sines [B, S, 2, H], each half of the head dim the same.

    Source: RoFormer (arXiv 2104.09864), with the halves laid out as Llama does.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS[..., None].float() * (1.0 / theta**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-2).repeat(1, 1, 1, 2).to(dtype)


def rotate(x_BSQH: Tensor, table_BS2H: Tensor) -> Tensor:
    """Returns heads turned by their positions."""
    cos, sin = table_BS2H[:, :, None, 0], table_BS2H[:, :, None, 1]
    first, second = x_BSQH.chunk(2, dim=-1)
    return x_BSQH * cos + torch.cat([-second, first], dim=-1) * sin


class SaisaAttention(nn.Module):
    """Text queries over visual and text keys."""

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_repeats = config.num_attention_heads // config.num_key_value_heads
        width_q, width_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width_q, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, kv_BSD: Tensor, slots: Slots, rotary_BS2H: Tensor, mask: Tensor, cache: Any
    ) -> Tensor:
        """Returns [B, T, D]; appends the keys and values of the step to the cache, if there is one."""
        split = (-1, self.head_dim)
        query = rotate(self.q_proj(x_BTD).unflatten(-1, split), slots.gather(rotary_BS2H)).transpose(1, 2)
        key = rotate(self.k_proj(kv_BSD).unflatten(-1, split), rotary_BS2H).transpose(1, 2)
        value = self.v_proj(kv_BSD).unflatten(-1, split).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if self.num_repeats > 1:
            key, value = (t.repeat_interleave(self.num_repeats, dim=1) for t in (key, value))
        out_BQTH = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out_BQTH.transpose(1, 2).flatten(2))


class SaisaMLP(nn.Module):
    """The gated FFN of Llama."""

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        return self.down_proj(silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def build_projector(config: SaisaConfig) -> nn.Module:
    """Returns MLP_i: features [.., C] to visual tokens [.., D]."""
    width, hidden = config.vision_config.hidden_size, config.hidden_size
    if config.projector_type == "linear":
        return nn.Linear(width, hidden)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class SaisaLayer(nn.Module):
    """One layer: project the features, let text attend to both, run the FFN on text."""

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__()
        self.mm_projector = build_projector(config)
        self.input_layernorm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SaisaAttention(config, layer)
        self.post_attention_layernorm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SaisaMLP(config)

    def forward(
        self, t_BTD: Tensor, features_NPC: Tensor | None, slots: Slots, rotary: Tensor, mask: Tensor, cache: Any
    ) -> Tensor:
        """Returns the text rows [B, T, D] of the next layer."""
        x_BTD = kv_BSD = self.input_layernorm(t_BTD)
        if features_NPC is not None:
            kv_BSD = slots.merge(x_BTD, self.input_layernorm(self.mm_projector(features_NPC)))
        h_BTD = t_BTD + self.self_attn(x_BTD, kv_BSD, slots, rotary, mask, cache)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class SaisaModel(nn.Module):
    """Embedding, vision encoder, layers and final norm."""

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SaisaLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_tower = VisionTower(config.vision_config, config.vision_select_layer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions_BS: Tensor | None,
        pixels: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Returns the final hidden states [B, S, D], zero at visual slots."""
        num_cached = cache.get_seq_length() if cache is not None else 0
        num_keys = num_cached + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], num_keys, dtype=torch.long, device=input_ids.device)
        if attention_mask.shape != (input_ids.shape[0], num_keys):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it must cover the {num_cached} cached and "
                f"{input_ids.shape[1]} new positions of {input_ids.shape[0]} samples"
            )
        if positions_BS is None:
            positions_BS = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_cached:]

        visual_BS = input_ids == self.config.image_token_id
        features_NPC = None if pixels is None else self.encode_images(pixels, int(visual_BS.sum()))
        if pixels is None and input_ids.shape[1] > 1 and bool(visual_BS.any()):  # a decoding step must not wait
            raise ValueError(f"input_ids hold {int(visual_BS.sum())} image placeholders but there are no pixel_values")
        slots = Slots.find(visual_BS, features_NPC is not None)

        t_BTD = self.embed_tokens(slots.gather(input_ids.masked_fill(visual_BS, 0)))
        rotary_BS2H = rotary_table(positions_BS, self.config.head_dim, self.config.rope_theta, t_BTD.dtype)
        # A query sees the real keys up to its own slot; itself always, so that a padding row stays finite.
        key_M = torch.arange(num_keys, device=input_ids.device)
        query_BT1 = slots.gather(key_M[None, num_cached:].expand_as(input_ids))[..., None]
        mask_B1TM = ((key_M < query_BT1) & attention_mask.bool()[:, None] | (key_M == query_BT1))[:, None]
        for layer in self.layers:
            t_BTD = layer(t_BTD, features_NPC, slots, rotary_BS2H, mask_B1TM, cache)
        return slots.merge(self.norm(t_BTD).to(input_ids.device), 0.0)

    def encode_images(self, pixels_N3HW: Tensor, num_placeholders: int) -> Tensor:
        """Returns the features [N, P, C].

        Raises:
            ValueError: the images do not fill the placeholders.
        """
        num_images, per_image = pixels_N3HW.shape[0], self.config.num_image_tokens
        if num_images * per_image != num_placeholders:
            raise ValueError(
                f"{num_images} images need {num_images * per_image} placeholders in input_ids ({per_image} each), but "
                f"there are {num_placeholders}; write one <image> in the text for every image"
            )
        return self.vision_tower(pixels_N3HW)


class SaisaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A SAISA model that reads text and images and writes text."""

    config: SaisaConfig
    config_class = SaisaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = ["SaisaLayer", "VisionTower"]
    _supports_sdpa = True
    # transformers 5 wants target and source; 4.57 reads the targets, which are a dictionary's keys.
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__(config)
        self.model = SaisaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Starts a new model with normal weights and zero biases; norms start at 1."""
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the language model head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Returns logits, and a loss when there are labels.

        Args:
            input_ids: int64[B, S], `num_image_tokens` times `image_token_id` for every image.
            attention_mask: [B, cached + S], 0 at padding, which may stand on either side.
            position_ids: int64[B, S]; counted from the attention mask when absent.
            pixel_values: [N, 3, H, W], the images of all samples in order of appearance.
            labels: int64[B, S], -100 where there is no target. A visual token is no target, nor is what follows one:
                no text position predicts it.
            logits_to_keep: the last so many positions (0: all), or the indices of positions, to compute logits for.

        Returns:
            `logits` [B, kept, V], all zero at visual positions; `past_key_values` with visual keys held once.

        Raises:
            ValueError: images and placeholders do not match, or shapes do not fit.
        """
        if past_key_values is not None and getattr(past_key_values, "is_compileable", False):
            raise ValueError("SAISA works with dynamic caches only; leave cache_implementation unset")
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_BSD = self.model(input_ids, attention_mask, position_ids, pixel_values, past_key_values)

        # The head has no bias, so zero hidden states give zero logits.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_BSD[:, kept])
        loss: Any = None if labels is None else self._loss(logits, labels, input_ids)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits_BSV: Tensor, labels_BS: Tensor, input_ids: Tensor) -> Tensor:
        if logits_BSV.shape[:2] != labels_BS.shape:
            raise ValueError("labels need the logits of every position; leave logits_to_keep unset")
        visual_BS = input_ids == self.config.image_token_id
        targets = labels_BS[:, 1:].masked_fill(visual_BS[:, :-1] | visual_BS[:, 1:], IGNORE_INDEX)
        total = cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the inputs of the next step: what the cache does not hold yet, with images where they are new.

        Raises:
            ValueError: a prompt ends in an image or in padding.
        """
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        new_ids = input_ids[:, num_cached - num_total :]  # a caller who goes on from a cache may pass only the new ids
        # Decoding steps carry one generated token and need no look (which would wait for the GPU).
        is_image = new_ids == self.config.image_token_id if new_ids.shape[1] > 1 or num_cached == 0 else None
        if is_image is not None and bool(is_image[:, -1].any()):
            raise ValueError("a prompt ends in an image, and a visual token predicts nothing; add text after the image")
        if is_image is not None and attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("a prompt ends in padding, and generation goes on from its end; use padding_side='left'")
        return {
            "input_ids": new_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values if is_image is not None and bool(is_image.any()) else None,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Returns every sample `expand_size` times in a row (beams), each with its own images in order."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            counts = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
            samples = pixels.split(counts.tolist())
            pixels = torch.cat([images for images in samples for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs | ({} if pixels is None else {"pixel_values": pixels})
