"""SAISA: visual tokens never ask, they only answer (arXiv 2502.02458).

The residual stream holds **text only**. Each layer i receives its own visual tokens straight from the frozen features
Z of the vision encoder, shows them to its text tokens as keys and values, and forgets them:

    V_i   = MLP_i(Z)                           a projector for every layer (one shared by all in stage 1)
    x, u  = RMSNorm_i(T_i), RMSNorm_i(V_i)     the layer's own input norm, on both
    Q     = x W_Q                              text only
    K, Vv = [u; x] W_K, [u; x] W_V             visual and text
    H_i   = Attention(Q, K, Vv) W_O + T_i      text only
    T_i+1 = FFN_i(RMSNorm(H_i)) + H_i          text only

Everything is made of megatron-core layers, so that tensor and sequence parallelism, DDP, the distributed optimizer and
its checkpoints apply unchanged. Rows are packed samples (`model.pack`), without a batch dimension. A model object is
one stage of the pipeline; with one stage it is the whole.

Dims: T text tokens, R those with a target, I visual tokens, S = I + T keys, D hidden, N query heads, G key/value heads,
H head dim, F FFN, C vision width, V vocabulary. Between the layers T and I are this rank's rows (T/tp and I/tp) under
sequence parallelism; N and G are this rank's heads under tensor parallelism.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import ModuleDict
from torch.nn.functional import gelu

from model.attention import Rotary, attention, rotary_table, rotate
from model.backend import LayerBuilder
from model.config import ModelConfig
from model.pack import Pack
from model.parallel import Stage, padded_vocab_size


class Projector(MegatronModule):
    """Turns vision features into the visual tokens of a layer: Linear, GELU, Linear (or one Linear, table 7)."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig) -> None:
        super().__init__(builder.config)
        self.tp_group, self.kind = builder.tp_group, model.projector
        width, hidden = model.vision.hidden_size, model.hidden_size
        if self.kind == "mlp":  # every rank has all features, so the first layer need not gather rows
            self.fc1 = builder.column_parallel(width, hidden, bias=True, whole_rows=True)
            self.fc2 = builder.row_parallel(hidden, hidden, bias=True)
        else:
            self.linear = builder.row_parallel(width, hidden, bias=True)

    def forward(self, features_IC: Tensor) -> Tensor:
        """Returns [I, D]; under sequence parallelism this rank's rows."""
        if self.kind == "linear":
            mine = features_IC.chunk(self.tp_group.size(), dim=-1)[self.tp_group.rank()]
            return self.linear(mine.contiguous())[0]
        return self.fc2(gelu(self.fc1(features_IC)[0]))[0]


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

    def __init__(self, builder: LayerBuilder, model: ModelConfig, own_projector: bool, backend: str) -> None:
        super().__init__(builder.config)
        self.builder = builder
        self.projector = Projector(builder, model) if own_projector else None
        self.input_norm = builder.rms_norm()
        self.attention = NaavitAttention(builder, model, backend)
        self.post_attention_norm = builder.rms_norm()
        self.mlp = builder.mlp(model.hidden_size)

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns the next text states [T, D].

        `visual` is the features [I, C], or what the shared projector made of them, [I, D].
        """

        def attend(text_TD: Tensor, visual: Tensor) -> Tensor:
            visual_ID = visual if self.projector is None else self.projector(visual)
            return self.attention(self.input_norm(text_TD), self.input_norm(visual_ID), pack, rotary_S1H)

        if self.training and self.config.recompute_granularity == "selective":
            text_TD = text_TD + self.builder.recomputed(attend, text_TD, visual)
        else:
            text_TD = text_TD + attend(text_TD, visual)
        return text_TD + self.mlp(self.post_attention_norm(text_TD))[0]


class SaisaModel(MegatronModule):
    """One stage of SAISA: token ids or text states and frozen vision features in, losses or text states out.

    With `shared_projector` (stage 1 of training) one projector serves all layers, and runs once a pack on every stage.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        stage: Stage,
        shared_projector: bool,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(config)
        self.model, self.stage, self.tp_group = model, stage, groups.tp
        # What megatron-core's schedules and gradient finalization ask every model
        self.model_type, self.pre_process, self.post_process = (
            ModelType.encoder_or_decoder,
            stage.is_first,
            stage.is_last,
        )
        self.share_embeddings_and_output_weights = False  # over stages: tied embeddings are refused there
        self.input_tensor: Tensor | None = None
        self.builder = builder = LayerBuilder(config, groups.tp)
        self.embedding = builder.embedding(padded_vocab_size(model)) if stage.is_first else None
        self.shared_projector = Projector(builder, model) if shared_projector else None
        self.layers = ModuleDict()  # by number in the whole model, so that names are the same at any split
        for number in stage.layers:
            with builder.fp8_at_creation(number):
                self.layers[str(number)] = SaisaLayer(builder, model, not shared_projector, attention_backend)
        self.final_norm = builder.rms_norm() if stage.is_last else None
        self.output = (
            builder.vocabulary_head(padded_vocab_size(model), tied=model.tie_embeddings) if stage.is_last else None
        )
        if self.shared_projector is not None:
            for parameter in self.shared_projector.parameters():
                mark_as_shared_by_stages(parameter, is_first=stage.is_first)

    def forward(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns fp32[num_targets], the cross-entropy of every target of the pack in row order.

        A stage that is not the last returns text states [T, 1, D]; `features_IC` are those of the pack's images.
        """
        text_TD = self.hidden_states(pack, features_IC)
        if not self.stage.is_last:
            # Megatron-core's pipeline passes [rows, batch, D] on, then frees its memory, which it refuses for a view.
            return make_viewless_tensor(text_TD[:, None], requires_grad=True, keep_graph=True)
        if self.config.sequence_parallel:  # every rank computes the same loss, so it takes back its rows' gradient only
            text_TD = gather_from_sequence_parallel_region(
                text_TD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        # The head is as wide as the vocabulary, so only rows that have a target pass it.
        logits_RV = self.logits(text_TD.index_select(0, pack.target_rows_R))
        return self.builder.cross_entropy(logits_RV, pack.targets_T.index_select(0, pack.target_rows_R))

    def hidden_states(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns the text states [T, D] that leave this stage (with the last, after the final norm)."""
        text_TD = self.input_states(pack)
        rotary_S1H = rotary_table(
            pack.key_positions_S,
            self.model.head_dim,
            self.model.rope_theta,
            self.config.params_dtype,
            self.config.apply_rope_fusion,
        )
        with self.builder.fp8_of_all():
            visual = features_IC if self.shared_projector is None else self._project_once(features_IC)
            for number, layer in self.numbered_layers():
                with self.builder.fp8_of_layer(number):
                    if self.training and self.config.recompute_granularity == "full":
                        text_TD = self.builder.recomputed(layer, text_TD, visual, pack, rotary_S1H)
                    else:
                        text_TD = layer(text_TD, visual, pack, rotary_S1H)
        return text_TD if self.final_norm is None else self.final_norm(text_TD)

    def input_states(self, pack: Pack) -> Tensor:
        """Returns the text states [T, D] that enter this stage's layers."""
        if self.embedding is None:
            assert self.input_tensor is not None, "the schedule has handed this stage no states"
            return self.input_tensor.squeeze(1)
        states = self.embedding(pack.token_ids_T[None])
        return states.squeeze(1 if self.config.sequence_parallel else 0)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns [T, V] (this rank's part of V under tensor parallelism); rows beyond the vocabulary are -inf."""
        assert self.output is not None
        weight = cast(Any, self.embedding).weight if self.model.tie_embeddings else None
        logits_TV = self.output(hidden_TD, weight=weight)[0]
        first = self.tp_group.rank() * logits_TV.shape[-1]
        num_real = min(max(self.model.vocab_size - first, 0), logits_TV.shape[-1])
        if num_real == logits_TV.shape[-1]:
            return logits_TV
        is_padding_V = torch.arange(logits_TV.shape[-1], device=logits_TV.device) >= num_real
        return logits_TV.masked_fill(is_padding_V, float("-inf"))

    def numbered_layers(self) -> Iterator[tuple[int, SaisaLayer]]:
        """Yields this stage's layers and their numbers in the whole model."""
        for name, layer in self.layers.items():
            yield int(name), cast(SaisaLayer, layer)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the text states of the previous pipeline stage; the first has none."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Returns what `dist_checkpointing` needs to know of every parameter, under names of the whole model.

        The shared projector, which every stage has, is written by the first.
        """
        state: ShardedStateDict = {}
        for name, module in self.named_children():
            if module is not self.layers:
                state |= sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, self.tp_group
                )
        for number, layer in self.numbered_layers():
            state |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        for name, entry in state.items():
            if name.startswith(f"{prefix}shared_projector."):
                entry.replica_id = (self.stage.number, *entry.replica_id[1:])
        return state

    def _project_once(self, features_IC: Tensor) -> Tensor:
        assert self.shared_projector is not None
        with self.builder.fp8_of_layer(self.model.num_layers // 2):  # on every stage the same, and no edge layer
            return self.shared_projector(features_IC)


def mark_as_shared_by_stages(parameter: torch.nn.Parameter, is_first: bool) -> None:
    """Marks a parameter that every stage has a copy of.

    Megatron-core then sums its gradient over the pipeline (`pipeline_parallel`, with `config.has_cond_embedder`), and
    counts it once in the gradient norm (`shared` copies do not count).
    """
    cast(Any, parameter).pipeline_parallel = True
    cast(Any, parameter).shared = not is_first
