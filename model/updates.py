"""Layers that change visual tokens on their way up: those of the architectures that SAISA is compared with.

Such a layer gives the states of visual tokens and then those of text, [S, D]. Dims: as in `model.saisa`.
"""

import torch
from torch import Tensor

from model.attention import Rotary, attention, rotate
from model.backend import LayerBuilder
from model.config import ModelConfig
from model.flamingo import FlamingoLayer, Front
from model.layers import NaavitAttention, Projector, SaisaLayer
from model.pack import Pack


class CausalAttention(NaavitAttention):
    """Self-attention in which images and text both ask: every row sees those at or before it, as in LLaVA."""

    def forward(self, text_TD: Tensor, visual_ID: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns [S, D]: what each visual and then each text token gathers; under sequence parallelism this rank's."""
        rows_SD, num_visual = torch.cat([visual_ID, text_TD]), len(visual_ID)
        q_SNH = self.linear_q(rows_SD)[0].unflatten(-1, (-1, self.head_dim))
        kv_SG2H = self.linear_kv(rows_SD)[0].unflatten(-1, (-1, 2 * self.head_dim))
        q_SNH, kv_SG2H = (self._visual_first(rows, num_visual) for rows in (q_SNH, kv_SG2H))
        k_SGH, v_SGH = kv_SG2H.chunk(2, dim=-1)
        q_SNH, k_SGH = rotate(q_SNH, rotary_S1H), rotate(k_SGH, rotary_S1H)
        rows_S, slots_S, as_text = pack.in_order
        q_SNH, k_SGH, v_SGH = (x.index_select(0, rows_S) for x in (q_SNH, k_SGH, v_SGH))
        out_SNH = attention(q_SNH, k_SGH, v_SGH, as_text, self.backend)
        return self.linear_proj(self._by_rank(out_SNH.index_select(0, slots_S).flatten(1), num_visual))[0]

    def _by_rank(self, rows: Tensor, num_visual: int) -> Tensor:
        """Returns what `_visual_first` was given: of each rank its visual rows, then its text rows."""
        if self.num_row_parts == 1:
            return rows
        visual, text = rows.tensor_split([num_visual * self.num_row_parts])
        return torch.cat([x.unflatten(0, (self.num_row_parts, -1)) for x in (visual, text)], dim=1).flatten(0, 1)


class UpdatingLayer(SaisaLayer):
    """A decoder layer that visual tokens leave behind its FFN, or with causal attention behind that and its FFN."""

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns the next states of visual tokens and then of text, [S, D].

        `visual` is the features [I, C] if the layer has a projector, else visual tokens [I, D].
        """

        def attend(text_TD: Tensor, visual_ID: Tensor) -> Tensor:
            return self.attention(self.input_norm(text_TD), self.input_norm(visual_ID), pack, rotary_S1H)

        visual_ID = visual if self.projector is None else self.projector(visual, pack.num_visual_padding)
        attended = self.selectively(attend, text_TD, visual_ID)
        if isinstance(self.attention, CausalAttention):
            rows_SD = torch.cat([visual_ID, text_TD]) + attended
        else:
            rows_SD = torch.cat([visual_ID, text_TD + attended])
        return rows_SD + self.mlp(self.post_attention_norm(rows_SD))[0]


def build_front(builder: LayerBuilder, model: ModelConfig) -> Projector | Front:
    """Returns what stands in front of all layers where one serves all."""
    return (Front if model.cross_attention == "open_flamingo" else Projector)(builder, model)


def build_layer(
    builder: LayerBuilder, model: ModelConfig, number: int, own_projector: bool, backend: str
) -> SaisaLayer:
    """Returns a layer of the model by its number; without a projector if one outside the layers serves all."""
    kind = model.layers[number]
    if kind.shown != "layer":
        return FlamingoLayer(builder, model, backend, has_block=kind.shown == "block")
    attention = (CausalAttention if kind.update == "full" else NaavitAttention)(builder, model, backend)
    layer = SaisaLayer if kind.update == "none" else UpdatingLayer
    return layer(builder, model, attention, own_projector and kind.is_projected)
