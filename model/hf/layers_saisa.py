"""The layers of SAISA: visual tokens never ask, they only answer (arXiv 2502.02458).

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

Dims: B samples, S slots (visual and text), T text rows (the most that a sample has), M keys (cached and new; all slots
of a static cache), N images, P visual tokens an image, C vision width, D hidden, Q query heads, G key/value heads,
H head dim, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_saisa import SaisaConfig
from .projectors_saisa import build_projector


class Slots(NamedTuple):
    """Where the rows of a step stand: which new slots are visual, and which the text rows are.

    Samples with fewer text rows than the longest borrow visual slots to fill up. What such a row computes is finite
    and never read: its keys are overwritten by the visual ones and its output by zeros.
    """

    visual_BS: Tensor
    text_BT: Tensor | None  # None: every slot is text, T = S

    @classmethod
    def find(cls, visual_BS: Tensor, num_visual: int) -> "Slots":
        """Returns the layout of so many visual tokens; text slots come first in a stable sort by "is visual"."""
        if num_visual == 0:
            return cls(visual_BS, None)
        num_samples, num_rows = visual_BS.shape
        if num_samples == 1:
            num_rows -= num_visual
        elif not torch.compiler.is_compiling():  # a graph has one shape for all, so there every slot has a row
            num_rows = int((~visual_BS).sum(dim=1).max())
        return cls(visual_BS, visual_BS.int().argsort(dim=1, stable=True)[:, :num_rows])

    def place(self, visual_NPD: Tensor) -> Tensor:
        """Returns [B, S, D] with visual tokens in their slots and zeros in the others."""
        empty_BSD = visual_NPD.new_zeros(*self.visual_BS.shape, visual_NPD.shape[-1])
        return empty_BSD.masked_scatter(self.visual_BS[..., None], visual_NPD)

    def join(self, text_BTD: Tensor, visual_BSD: Tensor) -> Tensor:
        """Returns [B, S, D] with text rows in their slots and the others as they are in `visual_BSD`."""
        return torch.where(self.visual_BS[..., None], visual_BSD, self.merge(text_BTD, 0.0))

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


class View(NamedTuple):
    """What a step's attention needs to know, the same in every layer.

    Fields:
        rotary_BS2H: cosines and sines of the new slots.
        mask_B1TM: true where a text row may see a key.
        slot_S: the cache's slots of the new keys.
        has_weights: work the attention weights out, instead of calling a kernel that never holds them.
        mask_B1SM: true where the row of any slot may see a key; only where visual tokens ask too.
        seen: what rows see of the images in blocks of cross-attention; see `flamingo_saisa`.
    """

    rotary_BS2H: Tensor
    mask_B1TM: Tensor
    slot_S: Tensor
    has_weights: bool
    mask_B1SM: Tensor | None = None
    seen: Any = None


def attend_without_weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    """Returns [B, Q, T, H]."""
    return scaled_dot_product_attention(query, key, value, attn_mask=mask), None


def attend_with_weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [B, Q, T, H] and the weights [B, Q, T, M], with a softmax in fp32."""
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value, weights


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
        self, x_BTD: Tensor, kv_BSD: Tensor, slots: Slots, view: "View", cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, T, D], and weights [B, Q, T, M] if the view asks for them.

        The keys and values of the step are appended to the cache, if there is one.
        """
        split = (-1, self.head_dim)
        query = rotate(self.q_proj(x_BTD).unflatten(-1, split), slots.gather(view.rotary_BS2H)).transpose(1, 2)
        key = rotate(self.k_proj(kv_BSD).unflatten(-1, split), view.rotary_BS2H).transpose(1, 2)
        value = self.v_proj(kv_BSD).unflatten(-1, split).transpose(1, 2)
        if cache is not None:
            # transformers 5 counts the slots of a static cache itself and does not look at the last argument
            key, value = cache.update(key, value, self.layer, {"cache_position": view.slot_S})
        if self.num_repeats > 1:
            key, value = (t.repeat_interleave(self.num_repeats, dim=1) for t in (key, value))
        attend = attend_with_weights if view.has_weights else attend_without_weights
        out_BQTH, weights_BQTM = attend(query, key, value, view.mask_B1TM)
        return self.o_proj(out_BQTH.transpose(1, 2).flatten(2)), weights_BQTM


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


class SaisaLayer(GradientCheckpointingLayer):
    """One layer: text attends to visual tokens and text, then passes the FFN.

    With a projector it makes its visual tokens from the features; otherwise it takes those of the layer below.
    """

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__()
        self.mm_projector = build_projector(config) if config.layer_kinds[layer].is_projected else None
        self.input_layernorm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SaisaAttention(config, layer)
        self.post_attention_layernorm = SaisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SaisaMLP(config)

    def forward(
        self, t_BTD: Tensor, visual: Tensor | None, slots: Slots, view: View, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the text rows [B, T, D] of the next layer, its visual tokens [B, S, D], and attention weights.

        Args:
            t_BTD: text rows.
            visual: features [N, P, C] if the layer has a projector, else visual tokens in their slots [B, S, D].
            slots: where rows stand.
            view: what rows see; it says whether weights are wanted.
            past_key_values: a cache to fill.
        """
        x_BTD = kv_BSD = self.input_layernorm(t_BTD)
        if visual is not None and self.mm_projector is not None:
            kv_BSD = slots.merge(x_BTD, self.input_layernorm(self.mm_projector(visual)))
        elif visual is not None:
            kv_BSD = slots.join(x_BTD, self.input_layernorm(visual))
        attended_BTD, weights_BQTM = self.self_attn(x_BTD, kv_BSD, slots, view, past_key_values)
        h_BTD = t_BTD + attended_BTD
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD)), visual, weights_BQTM
