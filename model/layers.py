"""The layers of SAISA, made of megatron-core's: projector, attention, and the decoder layer around them.

Dims: as in `model.saisa`.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import scatter_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import gelu

from model.attention import Rotary, attention, rotate
from model.backend import LayerBuilder
from model.config import ModelConfig
from model.hf.projectors_saisa import Resampler
from model.pack import Pack, rows_of_pack


class Projector(MegatronModule):
    """Turns vision features into the visual tokens of a layer; `model.projectors` says of which kinds."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig) -> None:
        super().__init__(builder.config)
        self.tp_group, self.num_features = builder.tp_group, model.vision.num_tokens
        width, hidden = model.vision.hidden_size, model.hidden_size
        self.fc1 = self.fc2 = self.linear = self.resampler = None
        if model.projector == "mlp":  # every rank has all features, so the first layer need not gather rows
            self.fc1 = builder.column_parallel(width, hidden, bias=True, whole_rows=True)
            self.fc2 = builder.row_parallel(hidden, hidden, bias=True)
        else:
            self.linear = builder.row_parallel(width, hidden, bias=True)
        if model.projector == "resampler":  # whole on every rank, and never in 8 bits
            self.resampler = Resampler(width, model.num_tokens_per_image, builder.config.params_dtype)

    def forward(self, features_IC: Tensor, num_padding: int) -> Tensor:
        """Returns [I, D]; under sequence parallelism this rank's rows.

        Args:
            features_IC: a row for each feature of an image; the last `num_padding` rows are padding, and remain.
            num_padding: rows.
        """
        if self.linear is None:
            assert self.fc1 is not None and self.fc2 is not None
            return self.fc2(gelu(self.fc1(features_IC)[0]))[0]
        if self.resampler is not None:
            num_rows = len(features_IC) - num_padding
            features_NPC = features_IC[:num_rows].unflatten(0, (num_rows // self.num_features, self.num_features))
            features_IC = rows_of_pack(self.resampler(features_NPC), num_padding)
        return self.linear(scatter_to_tensor_model_parallel_region(features_IC, self.tp_group))[0]


class NaavitAttention(MegatronModule):
    """Self-attention whose queries are text and whose keys and values are images and text."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig, backend: str) -> None:
        super().__init__(builder.config)
        self.head_dim, self.backend = model.head_dim, backend
        self.num_row_parts = builder.tp_group.size() if builder.config.sequence_parallel else 1
        query_size = model.num_attention_heads * model.head_dim
        kv_size = 2 * model.num_query_groups * model.head_dim
        self.linear_q = builder.column_parallel(model.hidden_size, query_size, bias=model.qkv_bias)
        self.linear_kv = builder.column_parallel(model.hidden_size, kv_size, bias=model.qkv_bias)
        self.linear_proj = builder.row_parallel(query_size, model.hidden_size)

    def forward(self, text_TD: Tensor, visual_ID: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns [T, D]: what each text token gathers from the images and text at or before it."""
        q_TNH = self.linear_q(text_TD)[0].unflatten(-1, (-1, self.head_dim))
        # Each key/value group's features stand together, key then value, so that tensor parallelism divides by group.
        kv_SG2H = self.linear_kv(torch.cat([visual_ID, text_TD]))[0].unflatten(-1, (-1, 2 * self.head_dim))
        k_SGH, v_SGH = self._visual_first(kv_SG2H, len(visual_ID)).chunk(2, dim=-1)
        num_visual = len(k_SGH) - len(q_TNH)
        q_TNH = rotate(q_TNH, tuple(table[num_visual:] for table in rotary_S1H))
        k_SGH = rotate(k_SGH, rotary_S1H)
        out_TNH = attention(q_TNH, k_SGH, v_SGH, pack, self.backend)
        return self.linear_proj(out_TNH.flatten(1))[0]

    def _visual_first(self, rows: Tensor, num_visual: int) -> Tensor:
        """Returns all visual rows, then all text rows; sequence parallelism gathers each rank's visual and text."""
        if self.num_row_parts == 1:
            return rows
        by_rank = rows.unflatten(0, (self.num_row_parts, -1))
        return torch.cat([by_rank[:, :num_visual].flatten(0, 1), by_rank[:, num_visual:].flatten(0, 1)])


class SaisaLayer(MegatronModule):
    """One decoder layer: text attends to its own images and text, then passes the FFN. Visual tokens do neither."""

    def __init__(
        self, builder: LayerBuilder, model: ModelConfig, attention: NaavitAttention, own_projector: bool
    ) -> None:
        super().__init__(builder.config)
        self.builder = builder
        self.projector = Projector(builder, model) if own_projector else None
        self.input_norm = builder.rms_norm()
        self.attention = attention
        self.post_attention_norm = builder.rms_norm()
        self.mlp = builder.mlp(model.hidden_size)

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns the next text states [T, D].

        `visual` is the features [I, C] if the layer has a projector, else visual tokens [I, D].
        """

        def attend(text_TD: Tensor, visual: Tensor) -> Tensor:
            visual_ID = visual if self.projector is None else self.projector(visual, pack.num_visual_padding)
            return self.attention(self.input_norm(text_TD), self.input_norm(visual_ID), pack, rotary_S1H)

        text_TD = text_TD + self.selectively(attend, text_TD, visual)
        return text_TD + self.mlp(self.post_attention_norm(text_TD))[0]

    def selectively(self, function: Callable[[Tensor, Tensor], Tensor], text_TD: Tensor, visual: Tensor) -> Tensor:
        """Returns what a function makes of both, computed again in the backward pass where that is configured."""
        if self.training and self.config.recompute_granularity == "selective":
            return self.builder.recomputed(function, text_TD, visual)
        return function(text_TD, visual)
