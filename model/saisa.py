"""SAISA: visual tokens never ask, they only answer (arXiv 2502.02458).

The residual stream holds **text only**. Each layer i receives its own visual tokens straight from the frozen features
Z of the vision encoder, shows them to its text tokens as keys and values, and forgets them:

    V_i   = MLP_i(Z)                           a projector for every layer (one shared by all in stage 1)
    x, u  = RMSNorm_i(T_i), RMSNorm_i(V_i)     the layer's own input norm, on both
    Q     = x W_Q                              text only
    K, Vv = [u; x] W_K, [u; x] W_V             visual and text
    H_i   = Attention(Q, K, Vv) W_O + T_i      text only
    T_i+1 = FFN_i(RMSNorm(H_i)) + H_i          text only

Everything is made of megatron-core layers, so that tensor parallelism, DDP, the distributed optimizer and its
checkpoints apply unchanged. Rows are packed samples (`model.pack`), without a batch dimension.

Dims: T text tokens, I visual tokens, S = I + T keys, D hidden, N query heads, G key/value heads, H head dim, F FFN,
C vision width, V vocabulary.
"""

from collections.abc import Iterable
from typing import cast

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import ModuleList
from torch.nn.functional import silu

from model.attention import dense_attention, rotary_table, rotate
from model.backend import Layers
from model.config import ModelConfig
from model.pack import IGNORE_INDEX, Pack


def build_transformer_config(model: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Returns the megatron-core configuration of the language model's layers, with parameters of `dtype`."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # losses are summed; the schedule divides by the global number of targets
        perform_initialization=False,  # every weight is loaded, see model.weights
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
    )


class Projector(MegatronModule):
    """Turns vision features into the visual tokens of a layer: Linear, GELU, Linear (or one Linear, table 7)."""

    def __init__(self, layers: Layers, model: ModelConfig) -> None:
        super().__init__(layers.config)
        width, hidden = model.vision.hidden_size, model.hidden_size
        self.mlp = layers.gelu_mlp(width, hidden) if model.projector == "mlp" else None
        self.linear = layers.gathered_linear(width, hidden) if model.projector == "linear" else None

    def forward(self, features_IC: Tensor) -> Tensor:
        """Returns [I, D]."""
        if self.linear is not None:
            return self.linear(features_IC)[0]
        assert self.mlp is not None
        out_ID, bias_D = self.mlp(features_IC)
        return out_ID + bias_D


class NaavitAttention(MegatronModule):
    """Self-attention whose queries are text and whose keys and values are images and text."""

    def __init__(self, layers: Layers, model: ModelConfig) -> None:
        super().__init__(layers.config)
        self.head_dim = model.head_dim
        query_size = model.num_attention_heads * model.head_dim
        kv_size = 2 * model.num_query_groups * model.head_dim
        self.linear_q = layers.column_parallel(model.hidden_size, query_size, bias=model.qkv_bias)
        self.linear_kv = layers.column_parallel(model.hidden_size, kv_size, bias=model.qkv_bias)
        self.linear_proj = layers.row_parallel(query_size, model.hidden_size)

    def forward(self, text_TD: Tensor, visual_ID: Tensor, pack: Pack, rotary_S1H: tuple[Tensor, Tensor]) -> Tensor:
        """Returns [T, D]: what each text token gathers from the images and text at or before it."""
        q_TNH = self.linear_q(text_TD)[0].unflatten(-1, (-1, self.head_dim))
        # Each key/value group's features stand together, key then value, so that tensor parallelism divides by group.
        kv_SG2H = self.linear_kv(torch.cat([visual_ID, text_TD]))[0].unflatten(-1, (-1, 2 * self.head_dim))
        k_SGH, v_SGH = kv_SG2H.chunk(2, dim=-1)
        cos_S1H, sin_S1H = rotary_S1H
        num_visual = visual_ID.shape[0]
        q_TNH = rotate(q_TNH, cos_S1H[num_visual:], sin_S1H[num_visual:])
        k_SGH = rotate(k_SGH, cos_S1H, sin_S1H)
        out_TNH = dense_attention(q_TNH, k_SGH, v_SGH, pack)
        return self.linear_proj(out_TNH.flatten(1))[0]


class SaisaLayer(MegatronModule):
    """One decoder layer: text attends to its own images and text, then passes the FFN. Visual tokens do neither."""

    def __init__(self, layers: Layers, model: ModelConfig, own_projector: bool) -> None:
        super().__init__(layers.config)
        self.projector = Projector(layers, model) if own_projector else None
        self.input_norm = layers.rms_norm()
        self.attention = NaavitAttention(layers, model)
        self.post_attention_norm = layers.rms_norm()
        self.mlp = layers.mlp(model.hidden_size, model.ffn_hidden_size)

    def forward(self, text_TD: Tensor, visual_ID: Tensor, pack: Pack, rotary_S1H: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the next text states [T, D]."""
        text_TD = text_TD + self.attention(self.input_norm(text_TD), self.input_norm(visual_ID), pack, rotary_S1H)
        return text_TD + self.mlp(self.post_attention_norm(text_TD))[0]


class SaisaModel(MegatronModule):
    """Text tokens and frozen vision features in, the loss of each target out.

    With `shared_projector` (stage 1) one projector serves all layers, and runs once.
    """

    def __init__(
        self, model: ModelConfig, shared_projector: bool, dtype: torch.dtype, groups: ProcessGroupCollection
    ) -> None:
        layers = Layers(build_transformer_config(model, dtype), groups.tp)
        super().__init__(layers.config)
        self.model = model
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.tp_group = groups.tp
        self.embedding = layers.embedding(model.vocab_size)
        self.shared_projector = Projector(layers, model) if shared_projector else None
        self.layers = ModuleList(SaisaLayer(layers, model, not shared_projector) for _ in range(model.num_layers))
        self.final_norm = layers.rms_norm()
        self.output = layers.vocabulary_head(model.vocab_size, tied=model.tie_embeddings)

    def hidden_states(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns the final text states [T, D]; `features_IC` are those of the pack's images, in order."""
        text_TD = self.embedding(pack.token_ids_T)
        rotary_S1H = rotary_table(pack.key_positions_S, self.model.head_dim, self.model.rope_theta)
        shared_ID = None if self.shared_projector is None else self.shared_projector(features_IC)
        for layer in cast(Iterable[SaisaLayer], self.layers):
            visual_ID = shared_ID if layer.projector is None else layer.projector(features_IC)
            text_TD = layer(text_TD, visual_ID, pack, rotary_S1H)
        return self.final_norm(text_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns [T, V] (this rank's part of V under tensor parallelism)."""
        return self.output(hidden_TD, weight=self.embedding.weight if self.model.tie_embeddings else None)[0]

    def forward(self, pack: Pack, features_IC: Tensor) -> Tensor:
        """Returns fp32[num_targets]: the cross-entropy of every target of the pack, in row order."""
        is_target_T = pack.targets_T != IGNORE_INDEX
        # The head is as wide as the vocabulary, so only rows that have a target pass it.
        hidden_TD = self.hidden_states(pack, features_IC)[is_target_T]
        logits_TV = self.logits(hidden_TD).float()
        return vocab_parallel_cross_entropy(logits_TV, pack.targets_T[is_target_T], tp_group=self.tp_group)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the text states of the previous pipeline stage; with one stage there are none."""
        inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        assert all(tensor is None for tensor in inputs)
