"""Layers that change visual tokens on their way up: those of the architectures that SAISA is compared with.

Dims: as in `layers_saisa`.
"""

from typing import Any

from torch import Tensor

from .configuration_saisa import SaisaConfig
from .flamingo_saisa import FlamingoLayer
from .layers_saisa import SaisaLayer, Slots, View


class UpdatingLayer(SaisaLayer):
    """A layer that visual tokens leave behind its FFN, or behind its attention and its FFN."""

    def __init__(self, config: SaisaConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.is_full = config.layer_kinds[layer].update == "full"

    def forward(
        self, t_BTD: Tensor, visual: Tensor | None, slots: Slots, view: View, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns and takes what `SaisaLayer.forward` does; text in the visual tokens it returns is not read."""
        if visual is None:
            return super().forward(t_BTD, visual, slots, view, past_key_values)
        if self.mm_projector is not None:
            visual = slots.place(self.mm_projector(visual))
        if self.is_full:
            assert view.mask_B1SM is not None
            rows_BSD = slots.join(t_BTD, visual)
            x_BSD = self.input_layernorm(rows_BSD)
            all_slots, view = slots._replace(text_BT=None), view._replace(mask_B1TM=view.mask_B1SM)
            attended_BSD, weights = self.self_attn(x_BSD, x_BSD, all_slots, view, past_key_values)
            rows_BSD = rows_BSD + attended_BSD
            weights = None if weights is None else slots.gather(weights.transpose(1, 2)).transpose(1, 2)
        else:
            x_BTD = self.input_layernorm(t_BTD)
            kv_BSD = slots.join(x_BTD, self.input_layernorm(visual))
            attended_BTD, weights = self.self_attn(x_BTD, kv_BSD, slots, view, past_key_values)
            rows_BSD = slots.join(t_BTD + attended_BTD, visual)
        rows_BSD = rows_BSD + self.mlp(self.post_attention_layernorm(rows_BSD))
        return slots.gather(rows_BSD), rows_BSD, weights


def build_layer(config: SaisaConfig, layer: int) -> SaisaLayer:
    """Returns a layer by its number."""
    kind = config.layer_kinds[layer]
    if kind.shown != "layer":
        return FlamingoLayer(config, layer)
    return (SaisaLayer if kind.update == "none" else UpdatingLayer)(config, layer)
