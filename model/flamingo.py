"""Flamingo: blocks of cross-attention between the layers of a language model that stays as it is (arXiv 2204.14198).

Before every k-th layer a block lets text rows x gather from the images Z before them, and passes an FFN:

    y = x + tanh(a) Attention(norm(x), Z)      queries from text, keys and values from images; no rotary, not causal
    z = y + tanh(b) FFN(norm(y))               gates a and b are numbers that start at 0

| kind            | Z                                           | attention                        | FFN            |
|-----------------|---------------------------------------------|----------------------------------|----------------|
| `open_flamingo` | of the latest image: a resampler's latents  | 8 heads of 64                    | 4 wide, GELU   |
| `llama_3_2`     | of all images: the features, by a projector | the LLM's heads and groups, each | the LLM's own, |
|                 |                                             | query and key with an RMSNorm    | gated          |

A row that sees no image gathers zero; in `llama_3_2` it passes the whole block unchanged. Norms are LayerNorms in
`open_flamingo`, RMSNorms in `llama_3_2`. The layers themselves attend to text alone, at the positions that text has
without images.

Source: OpenFlamingo (arXiv 2308.01390, `open_flamingo/src/helpers.py`); Llama 3 (arXiv 2407.21783, section 7), whose
blocks are transformers' `MllamaCrossAttentionDecoderLayer`.

Dims: as in `model.saisa`; I visual tokens: of `open_flamingo` latents of the encoder's width C, else of the model's D.
"""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import gelu

from model.attention import Rotary
from model.backend import LayerBuilder
from model.config import ModelConfig
from model.cross_attention import SeenImages, cross_attention, seen_images
from model.hf.family_saisa import FFN_WIDTHS, HEAD_DIM, NUM_HEADS
from model.hf.flamingo_saisa import Perceiver
from model.layers import NaavitAttention, SaisaLayer
from model.pack import Pack, rows_of_pack


class CrossAttention(MegatronModule):
    """Attention of text rows to images."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig, backend: str) -> None:
        super().__init__(builder.config)
        self.backend, self.latest_alone = backend, model.cross_attention == "open_flamingo"
        if self.latest_alone:
            self.head_dim, num_heads, num_groups, width = HEAD_DIM, NUM_HEADS, NUM_HEADS, model.vision.hidden_size
        else:
            self.head_dim, width = model.head_dim, model.hidden_size
            num_heads, num_groups = model.num_attention_heads, model.num_query_groups
        queries, keys_values = num_heads * self.head_dim, 2 * num_groups * self.head_dim
        self.linear_q = builder.column_parallel(model.hidden_size, queries, bias=False)
        self.linear_kv = builder.column_parallel(width, keys_values, bias=False, whole_rows=self.latest_alone)
        self.q_layernorm = None if self.latest_alone else builder.head_norm()
        self.k_layernorm = None if self.latest_alone else builder.head_norm()
        self.linear_proj = builder.row_parallel(queries, model.hidden_size)

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack, seen: SeenImages) -> Tensor:
        """Returns [T, D] for normed text and visual tokens [I, ...]; under sequence parallelism this rank's."""
        q_TNH = self.linear_q(text_TD)[0].unflatten(-1, (-1, self.head_dim))
        kv_IG2H = self.linear_kv(visual)[0].unflatten(-1, (-1, 2 * self.head_dim))
        k_IGH, v_IGH = kv_IG2H.chunk(2, dim=-1)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_TNH, k_IGH = self.q_layernorm(q_TNH), self.k_layernorm(k_IGH)
        out_TNH = cross_attention(q_TNH, k_IGH, v_IGH, pack, seen, self.backend)
        return self.linear_proj(out_TNH.flatten(1))[0]


class Block(MegatronModule):
    """A block of cross-attention and an FFN, each behind its gate."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig, backend: str) -> None:
        super().__init__(builder.config)
        self.is_open = model.cross_attention == "open_flamingo"
        self.builder = builder
        self.attention = CrossAttention(builder, model, backend)
        self.attention_gate, self.ffn_gate = builder.gate(), builder.gate()
        hidden = model.hidden_size
        if self.is_open:
            self.attention_norm, self.ffn_norm = builder.layer_norm(), builder.layer_norm()
            self.fc1 = builder.column_parallel(hidden, FFN_WIDTHS * hidden, bias=False)
            self.fc2 = builder.row_parallel(FFN_WIDTHS * hidden, hidden)
        else:
            self.attention_norm, self.ffn_norm = builder.rms_norm(), builder.rms_norm()
            self.mlp = builder.mlp(hidden)

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack) -> Tensor:
        """Returns the text rows [T, D] behind the block; `visual` are visual tokens [I, ...]."""
        seen = seen_images(pack, latest_alone=self.is_open)

        def attend(text_TD: Tensor, visual: Tensor) -> Tensor:
            return self.attention(self.attention_norm(text_TD), visual, pack, seen)

        is_repeated = self.training and self.config.recompute_granularity == "selective"
        attended_TD = self.builder.recomputed(attend, text_TD, visual) if is_repeated else attend(text_TD, visual)
        text_TD = text_TD + self.attention_gate.tanh() * attended_TD
        return text_TD + self.ffn_gate.tanh() * self._feed_forward(self.ffn_norm(text_TD), seen)

    def _feed_forward(self, x_TD: Tensor, seen: SeenImages) -> Tensor:
        if self.is_open:
            return self.fc2(gelu(self.fc1(x_TD)[0]))[0]
        sees_T1 = seen.sees_T[:, None]
        if self.config.sequence_parallel:
            sees_T1 = sees_T1.chunk(self.builder.tp_group.size())[self.builder.tp_group.rank()]
        return self.mlp(x_TD)[0] * sees_T1


class FlamingoLayer(SaisaLayer):
    """A layer of the language model, in which text attends to text alone; before some stands a block."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig, backend: str, has_block: bool) -> None:
        super().__init__(builder, model, NaavitAttention(builder, model, backend), own_projector=False)
        self.block = Block(builder, model, backend) if has_block else None

    def forward(self, text_TD: Tensor, visual: Tensor, pack: Pack, rotary_S1H: Rotary) -> Tensor:
        """Returns the next text states [T, D]; the rotary table is that of `pack.text_alone`."""
        if self.block is not None:
            text_TD = self.block(text_TD, visual, pack)
        no_visual = text_TD.new_zeros(0, text_TD.shape[1])
        return super().forward(text_TD, no_visual, pack.text_alone, rotary_S1H)


class Front(MegatronModule):
    """The resampler of `open_flamingo`: whole on every rank, and never in 8 bits."""

    def __init__(self, builder: LayerBuilder, model: ModelConfig) -> None:
        super().__init__(builder.config)
        self.num_features = model.vision.num_tokens
        dtype = builder.config.params_dtype
        self.resampler = Perceiver(model.vision.hidden_size, model.num_tokens_per_image, dtype)

    def forward(self, features_IC: Tensor, num_padding: int) -> Tensor:
        """Returns latents [I, C]; the last `num_padding` rows of features are padding, and remain."""
        num_rows = len(features_IC) - num_padding
        features_NPC = features_IC[:num_rows].unflatten(0, (num_rows // self.num_features, self.num_features))
        return rows_of_pack(self.resampler(features_NPC), num_padding)
