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

from model.attention import Rotary, rotary_table
from model.backend import LayerBuilder
from model.config import ModelConfig
from model.layers import SaisaLayer
from model.pack import Pack
from model.parallel import Stage, padded_vocab_size
from model.updates import build_front, build_layer


class SaisaModel(MegatronModule):
    """One stage of SAISA: token ids or text states and frozen vision features in, losses or text states out.

    With `shared_projector` (see `ModelConfig.shares_projector`) one projector serves all layers, and runs once a pack
    on every stage that takes features. Between two stages whose second takes its visual tokens from the first, these
    pass too, before the text.
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
        self.num_row_parts = groups.tp.size() if config.sequence_parallel else 1
        kinds = [model.layers[number] for number in stage.layers]
        self.takes_features = any(kind.takes_features for kind in kinds) or (
            stage.is_first and kinds[0].takes_from_below
        )
        self.builder = builder = LayerBuilder(config, groups.tp)
        self.embedding = builder.embedding(padded_vocab_size(model)) if stage.is_first else None
        self.shared_projector = build_front(builder, model) if shared_projector else None
        self.layers = ModuleDict()  # by number in the whole model, so that names are the same at any split
        for number in stage.layers:
            with builder.fp8_at_creation(number):
                self.layers[str(number)] = build_layer(builder, model, number, not shared_projector, attention_backend)
        self.final_norm = builder.rms_norm() if stage.is_last else None
        self.output = (
            builder.vocabulary_head(padded_vocab_size(model), tied=model.tie_embeddings) if stage.is_last else None
        )
        if self.shared_projector is not None:
            for parameter in self.shared_projector.parameters():
                mark_as_shared_by_stages(parameter, is_first=stage.is_first)

    def forward(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns fp32[num_targets], the cross-entropy of every target of the pack in row order.

        A stage that is not the last returns states [rows, 1, D]; `features_IC` are those of the pack's images.
        """
        text_TD, visual_ID = self.run_layers(pack, features_IC)
        if not self.stage.is_last:
            rows = text_TD if visual_ID is None else torch.cat([visual_ID, text_TD])
            # Megatron-core's pipeline passes [rows, batch, D] on, then frees its memory, which it refuses for a view.
            return make_viewless_tensor(rows[:, None], requires_grad=True, keep_graph=True)
        if self.config.sequence_parallel:  # every rank computes the same loss, so it takes back its rows' gradient only
            text_TD = gather_from_sequence_parallel_region(
                text_TD, tensor_parallel_output_grad=False, group=self.tp_group
            )
        # The head is as wide as the vocabulary, so only rows that have a target pass it.
        logits_RV = self.logits(text_TD.index_select(0, pack.target_rows_R))
        return self.builder.cross_entropy(logits_RV, pack.targets_T.index_select(0, pack.target_rows_R))

    def hidden_states(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns the text states [T, D] that leave this stage (with the last, after the final norm)."""
        return self.run_layers(pack, features_IC)[0]

    def run_layers(self, pack: Pack, features_IC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the text states [T, D] that leave this stage, and the visual ones [I, D] that the next one takes."""
        text_TD, visual = self.input_states(pack)
        rotary_S1H = rotary_table(
            (pack.text_alone if self.model.cross_attention else pack).key_positions_S,
            self.model.head_dim,
            self.model.rope_theta,
            self.config.params_dtype,
            self.config.apply_rope_fusion,
        )
        with self.builder.fp8_of_all():
            features = features_IC if self.shared_projector is None else self._project_once(features_IC, pack)
            if visual is None:
                visual = features
            elif self.shared_projector is not None and not self.takes_features:
                visual = torch.cat([visual, features])  # no rows
            for number, layer in self.numbered_layers():
                kind = self.model.layers[number]
                visual = features if kind.is_projected else visual
                with self.builder.fp8_of_layer(number):
                    rows = self._run(layer, text_TD, visual, pack, rotary_S1H)
                if kind.update == "none":
                    text_TD = rows
                else:
                    visual, text_TD = rows.tensor_split([len(rows) - len(text_TD)])
        if not self.takes_features and visual is features:  # a stage of flamingo without blocks
            text_TD = torch.cat([features.reshape(0, text_TD.shape[1]), text_TD])
        if self.final_norm is not None:
            return self.final_norm(text_TD), None
        return text_TD, visual if self._carries(self.stage.layers.stop) else None

    def _run(self, layer: SaisaLayer, text_TD: Tensor, visual: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        if self.training and self.config.recompute_granularity == "full":
            return self.builder.recomputed(layer, text_TD, visual, pack, rotary_S1H)
        return layer(text_TD, visual, pack, rotary_S1H)

    def input_states(self, pack: Pack) -> tuple[Tensor, Tensor | None]:
        """Returns the text states [T, D] that enter this stage's layers, and visual ones [I, D] if they take them."""
        if self.embedding is None:
            assert self.input_tensor is not None, "the schedule has handed this stage no states"
            rows = self.input_tensor.squeeze(1)
            if not self._carries(self.stage.layers.start):
                return rows, None
            visual_ID, text_TD = rows.tensor_split([len(rows) - len(pack.positions_T) // self.num_row_parts])
            return text_TD, visual_ID
        states = self.embedding(pack.token_ids_T[None])
        return states.squeeze(1 if self.config.sequence_parallel else 0), None

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

    def rows_before(self, layer: int, pack: Pack) -> int:
        """Returns how many rows of a pack go from one stage to the next before a layer, on this process."""
        num_visual = len(pack.visual_positions_I) if self._carries(layer) else 0
        return (len(pack.positions_T) + num_visual) // self.num_row_parts

    def _carries(self, layer: int) -> bool:
        """Whether there is a layer that takes its visual tokens from the one below."""
        return layer < self.model.num_layers and self.model.layers[layer].takes_from_below

    def _project_once(self, features_IC: Tensor, pack: Pack) -> Tensor:
        """Returns the visual tokens [I, D] of the projector that all stages have; on one that takes no features none.

        These still give it a part in the stage's result, and every parameter a gradient.
        """
        assert self.shared_projector is not None
        num_padding = pack.num_visual_padding if self.takes_features else 0
        features_IC = features_IC if self.takes_features else features_IC[:0]
        with self.builder.fp8_of_layer(self.model.num_layers // 2):  # on every stage the same, and no edge layer
            return self.shared_projector(features_IC, num_padding)


def mark_as_shared_by_stages(parameter: torch.nn.Parameter, is_first: bool) -> None:
    """Marks a parameter that every stage has a copy of.

    Megatron-core then sums its gradient over the pipeline (`pipeline_parallel`, with `config.has_cond_embedder`), and
    counts it once in the gradient norm (`shared` copies do not count).
    """
    cast(Any, parameter).pipeline_parallel = True
    cast(Any, parameter).shared = not is_first
