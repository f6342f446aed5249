"""Flamingo: blocks of cross-attention between the layers of a language model (arXiv 2204.14198).

Before every k-th layer text rows x gather from the images Z before them, and pass an FFN:

    y = x + tanh(a) Attention(norm(x), Z)      queries from text, keys and values from images; no rotary, not causal
    z = y + tanh(b) FFN(norm(y))               gates a and b are numbers that start at 0

`open_flamingo` sees the latest image alone, as the latents of a resampler; `llama_3_2` all of them, each as its
projected features, and leaves rows that see none as they are. The layers themselves attend to text alone.

Keys and values of images are made once. With a cache they are kept beside it, as its attribute: they have no slots.
Beams of a sample have the same images, so reordering them changes nothing.

Dims: as in `layers_saisa`; K images of the sample that has most, J rows of these images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from .configuration_saisa import SaisaConfig
from .family_saisa import FFN_WIDTHS, HEAD_DIM, NUM_HEADS, NUM_RESAMPLER_LAYERS
from .layers_saisa import SaisaLayer, SaisaMLP, SaisaRMSNorm, Slots, View
from .projectors_saisa import build_projector

KEPT = "images_of_flamingo"  # the attribute of a cache
NEVER = 1 << 30  # the slot of an image that is not there: no text stands behind it


class Images:
    """The images that a sequence has had so far, and what blocks have made of them.

    Attributes:
        is_visual_BM: true at placeholders, of all slots up to the last image.
        slot_BK: the first slot of each sample's images.
        keys_values: of each block, [B, G, J, H].
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.is_visual_BM = torch.zeros(num_samples, 0, dtype=torch.bool, device=device)
        self.slot_BK = torch.zeros(num_samples, 0, dtype=torch.long, device=device)
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, cache: Any, num_samples: int, device: torch.device) -> "Images":
        """Returns those that are kept with a cache, or none yet."""
        kept = getattr(cache, KEPT, None)
        is_compiled = torch.compiler.is_compiling()  # a graph is of later steps
        if kept is None or (not is_compiled and int(cache.get_seq_length()) == 0):  # a cache may be emptied, used again
            kept = cls(num_samples, device)
            if cache is not None:
                setattr(cache, KEPT, kept)
        return kept

    def without(self, mask_BM: Tensor, position_ids: Tensor, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which keys are text and no padding, and positions that count text alone."""
        is_visual_BM = self._is_visual(mask_BM.shape[1])
        return mask_BM & ~is_visual_BM, position_ids - is_visual_BM.long().cumsum(dim=1)[:, slot_S]

    def _is_visual(self, num_slots: int) -> Tensor:
        return pad(self.is_visual_BM, (0, num_slots - self.is_visual_BM.shape[1]))

    def add(self, visual_BS: Tensor, slot_S: Tensor, images_NLC: Tensor, per_image: int) -> Tensor:
        """Adds a step's images and returns them sample by sample, [B, K, L, C], zero where one has fewer."""
        first = int(slot_S[0])
        self.is_visual_BM = torch.cat([self._is_visual(first), visual_BS], dim=1)
        counts_B = visual_BS.sum(dim=1) // per_image
        num_images = int(counts_B.max())
        has_BK = torch.arange(num_images, device=visual_BS.device) < counts_B[:, None]
        # Slots of placeholders come first in a stable sort; every image has as many.
        slots_BS = slot_S[(~visual_BS).int().argsort(dim=1, stable=True)]
        slot_BK = slots_BS[:, ::per_image][:, :num_images].masked_fill(~has_BK, NEVER)
        self.slot_BK = torch.cat([self.slot_BK, slot_BK], dim=1)
        empty = images_NLC.new_zeros(*has_BK.shape, *images_NLC.shape[1:])
        return empty.masked_scatter(has_BK[..., None, None], images_NLC)


class Seen:
    """What the text rows of a step see of the images, the same in every block.

    Attributes:
        images: all there are.
        sees_BT1: true where a row sees any.
        mask_B1TJ: true where a row sees an image's row; all of them where it sees none, so that it stays finite.
        is_kept: keys and values are for later steps too.
    """

    def __init__(self, images: Images, slot_BT: Tensor, config: SaisaConfig, is_kept: bool) -> None:
        is_open = config.cross_attention == "open_flamingo"
        sees_BTK = images.slot_BK[:, None] < slot_BT[..., None]
        if is_open:
            slots_BTK = images.slot_BK[:, None].expand_as(sees_BTK).masked_fill(~sees_BTK, -1)
            sees_BTK = sees_BTK & (slots_BTK == slots_BTK.amax(dim=-1, keepdim=True))
        self.images, self.is_kept = images, is_kept
        self.sees_BT1 = sees_BTK.any(dim=-1, keepdim=True)
        self.mask_B1TJ = (sees_BTK | ~self.sees_BT1).repeat_interleave(config.num_image_tokens, dim=-1)[:, None]


class CrossAttention(nn.Module):
    """A block; before which layer it stands says where its keys and values are kept."""

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.is_open = layer, config.cross_attention == "open_flamingo"
        hidden = config.hidden_size
        if self.is_open:
            self.head_dim, num_heads, num_groups = HEAD_DIM, NUM_HEADS, NUM_HEADS
            width = config.vision_config.hidden_size
            self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.fc1 = nn.Linear(hidden, FFN_WIDTHS * hidden, bias=False)
            self.fc2 = nn.Linear(FFN_WIDTHS * hidden, hidden, bias=False)
        else:
            self.head_dim, width = config.head_dim, hidden
            num_heads, num_groups = config.num_attention_heads, config.num_key_value_heads
            self.attention_norm = SaisaRMSNorm(hidden, config.rms_norm_eps)
            self.ffn_norm = SaisaRMSNorm(hidden, config.rms_norm_eps)
            self.q_norm = SaisaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = SaisaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.mlp = SaisaMLP(config)
        self.num_repeats = num_heads // num_groups
        self.q_proj = nn.Linear(hidden, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden, bias=False)
        self.attention_gate, self.ffn_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, t_BTD: Tensor, images_BKLC: Tensor | None, seen: Seen | None) -> Tensor:
        """Returns the text rows [B, T, D] behind the block.

        `images_BKLC` are those that are new in this step; without anything seen there have been none so far.
        """
        if seen is not None:
            key, value = self._keys_values(images_BKLC, seen)
            query = self.q_proj(self.attention_norm(t_BTD)).unflatten(-1, (-1, self.head_dim))
            query = (query if self.is_open else self.q_norm(query)).transpose(1, 2)
            key, value = (x.repeat_interleave(self.num_repeats, dim=1) for x in (key, value))
            out_BQTH = scaled_dot_product_attention(query, key, value, attn_mask=seen.mask_B1TJ)
            out_BTD = self.o_proj(out_BQTH.transpose(1, 2).flatten(2) * seen.sees_BT1)
            t_BTD = t_BTD + self.attention_gate.tanh() * out_BTD
        elif not self.is_open:
            return t_BTD
        x_BTD = self.ffn_norm(t_BTD)
        if self.is_open:
            return t_BTD + self.ffn_gate.tanh() * self.fc2(gelu(self.fc1(x_BTD)))
        assert seen is not None
        return t_BTD + self.ffn_gate.tanh() * self.mlp(x_BTD) * seen.sees_BT1

    def _keys_values(self, images_BKLC: Tensor | None, seen: Seen) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, G, J, H] of all images so far, and keeps them if there are more steps."""
        kept = seen.images.keys_values.get(self.layer)
        if images_BKLC is not None:
            rows = images_BKLC.flatten(1, 2)
            key = self.k_proj(rows).unflatten(-1, (-1, self.head_dim))
            value = self.v_proj(rows).unflatten(-1, (-1, self.head_dim))
            key = key if self.is_open else self.k_norm(key)
            new: tuple[Tensor, Tensor] = (key.transpose(1, 2), value.transpose(1, 2))
            kept = new if kept is None else (torch.cat([kept[0], new[0]], dim=2), torch.cat([kept[1], new[1]], dim=2))
            if seen.is_kept:
                seen.images.keys_values[self.layer] = kept
        assert kept is not None
        return kept


class FlamingoLayer(SaisaLayer):
    """A layer of the language model, in which text attends to text alone; before some stands a block."""

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__(config, layer)
        has_block = config.layer_kinds[layer].shown == "block"
        self.cross_attention = CrossAttention(config, layer) if has_block else None

    def forward(
        self, t_BTD: Tensor, visual: Tensor | None, slots: Slots, view: View, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns and takes what `SaisaLayer.forward` does; `visual` are images [B, K, L, C] that are new."""
        if self.cross_attention is not None:
            t_BTD = self.cross_attention(t_BTD, visual, view.seen)
        x_BTD = self.input_layernorm(t_BTD)
        attended, weights_BQTM = self.self_attn(x_BTD, slots.merge(x_BTD, 0.0), slots, view, past_key_values)
        h_BTD = t_BTD + attended
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD)), visual, weights_BQTM


class PerceiverLayer(nn.Module):
    """Latents ask features and latents of their image, then pass an FFN."""

    def __init__(self, width: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        inner, ffn = NUM_HEADS * HEAD_DIM, FFN_WIDTHS * width
        self.feature_norm, self.latent_norm, self.ffn_norm = (nn.LayerNorm(width, dtype=dtype) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(3))
        self.o_proj = nn.Linear(inner, width, bias=False, dtype=dtype)
        self.fc1 = nn.Linear(width, ffn, bias=False, dtype=dtype)
        self.fc2 = nn.Linear(ffn, width, bias=False, dtype=dtype)

    def forward(self, latents_NLC: Tensor, features_NPC: Tensor) -> Tensor:
        """Returns the next latents."""
        x = self.latent_norm(latents_NLC)
        both = torch.cat([self.feature_norm(features_NPC), x], dim=1)
        projections = ((self.q_proj, x), (self.k_proj, both), (self.v_proj, both))
        heads = [f(rows).unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2) for f, rows in projections]
        latents_NLC = latents_NLC + self.o_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return latents_NLC + self.fc2(gelu(self.fc1(self.ffn_norm(latents_NLC))))


class Perceiver(nn.Module):
    """The resampler of `open_flamingo`: turns the features of every image into as many latents, of the same width."""

    def __init__(self, width: int, num_latents: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, width, dtype=dtype))
        self.layers = nn.ModuleList([PerceiverLayer(width, dtype) for _ in range(NUM_RESAMPLER_LAYERS)])
        self.norm = nn.LayerNorm(width, dtype=dtype)

    def forward(self, features_NPC: Tensor) -> Tensor:
        """Returns [N, L, C]."""
        latents_NLC = self.latents.repeat(len(features_NPC), 1, 1)
        for layer in self.layers:
            latents_NLC = layer(latents_NLC, features_NPC)
        return self.norm(latents_NLC)


def build_front(config: SaisaConfig) -> nn.Module | None:
    """Returns what stands in front of all layers, where one serves all."""
    if any(kind.is_projected for kind in config.layer_kinds):
        return None
    if config.cross_attention == "open_flamingo":
        return Perceiver(config.vision_config.hidden_size, config.num_image_tokens)
    return build_projector(config)
