"""What SAISA costs, from the sizes alone: parameters and FLOPs. `model.memory` says what it holds.

Model FLOPs are counted: the multiplications and additions of every matrix product once, forward and backward, two a
pair; norms, activations and the softmax as none, work that is done again to save memory not at all. Attention is
counted for full rectangles, as the paper does (arXiv 2502.02458, appendix A.2): a causal kernel does less. Sizes may be
numbers or arrays with one entry a sample; rows of padding are not counted unless they are in the sizes. The frozen
vision encoder is a figure of its own.

Symbols: t text tokens, v visual tokens, s = t + v keys, r targets of a sample; D hidden, N query heads, G key/value
heads, H head dim, F FFN, C vision width, V vocabulary filled up to `VOCABULARY_MULTIPLE`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig, Phase, VisionConfig
from model.flamingo_flops import block_flops, blocks_flops
from model.flamingo_weights import num_block_parameters
from model.hf.family_saisa import Update
from model.parallel import padded_vocab_size
from model.projectors import projector_plan


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model without the vision encoder.

    Attributes:
        projectors: n projectors, or the one that all layers share, or a resampler.
        blocks: cross-attention blocks between the layers.
        layers: all layers, without projectors and blocks.
        embedding: the token embedding.
        head: the output layer; 0 where it is tied to the embedding.
        final_norm: the norm before the head.
        num_trained: what the phase trains.
    """

    projectors: int
    blocks: int
    layers: int
    embedding: int
    head: int
    final_norm: int
    num_trained: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projectors + self.blocks + self.layers + self.embedding + self.head + self.final_norm


def num_projectors(model: ModelConfig, phase: Phase) -> int:
    """Returns how many projectors run on each image."""
    return 1 if model.shares_projector(phase) else model.num_own_projectors


def parameter_counts(model: ModelConfig, phase: Phase) -> ParameterCounts:
    """Returns the parameters of a model and how many of them a phase trains.

    Source: the shapes in `model.saisa`; which are trained: arXiv 2502.02458, section 4.
    """
    d = model.hidden_size
    queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
    bias = queries + keys_values if model.qkv_bias else 0
    layer = 2 * d + d * (2 * queries + keys_values) + bias + 3 * d * model.ffn_hidden_size
    vocabulary = padded_vocab_size(model) * d
    projectors, blocks = (
        projector_plan(model).num_parameters * num_projectors(model, phase),
        num_block_parameters(model),
    )
    new = dict(projectors=projectors, blocks=blocks)
    counts = new | dict(
        layers=model.num_layers * layer,
        embedding=vocabulary,
        head=0 if model.tie_embeddings else vocabulary,
        final_norm=d,
    )
    trained = counts if model.trains_language_model(phase) else new
    return ParameterCounts(**counts, num_trained=sum(trained.values()))


@dataclass(frozen=True)
class MatrixProducts[Count: (int, np.ndarray)]:
    """FLOPs of the matrix products of one forward pass, each a multiply and an add: 2 x rows x inputs x outputs.

    Attributes:
        projector_in: products of one projector with frozen features: their backward has no input gradient.
        projector_out: all other products of one projector.
        linear_q: queries of one layer.
        linear_other: keys and values, attention output and FFN of one layer.
        attention: the scores and the weighted sum of one layer, two products of equal cost.
        head: the vocabulary.
    """

    projector_in: Count
    projector_out: Count
    linear_q: Count
    linear_other: Count
    attention: Count
    head: Count


def matrix_products[Count: (int, np.ndarray)](
    model: ModelConfig, num_text: Count, num_visual: Count, num_targets: Count, update: Update = "none"
) -> MatrixProducts[Count]:
    """Returns the FLOPs of every matrix product of a forward pass, of a layer that updates visual tokens so.

    Source: arXiv 2502.02458, appendix A.2. Visual tokens pay for the projector and for keys and values; the rest is for
    the rows that pass it (`model.hf.family_saisa`). The head, as in `model.saisa`, sees rows with a target only.
    """
    d, plan = model.hidden_size, projector_plan(model)
    queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
    num_keys = num_text + num_visual
    num_asking = num_keys if update == "full" else num_text
    num_in_ffn = num_text if update == "none" else num_keys
    ffn = 3 * d * model.ffn_hidden_size
    return MatrixProducts(
        projector_in=2 * num_visual * plan.products_in // model.num_tokens_per_image,
        projector_out=2 * num_visual * plan.products_out // model.num_tokens_per_image,
        linear_q=2 * num_asking * d * queries,
        linear_other=2 * (num_keys * d * keys_values + num_asking * queries * d + num_in_ffn * ffn),
        attention=2 * 2 * num_asking * num_keys * queries,
        head=2 * num_targets * d * padded_vocab_size(model),
    )


def _updates(model: ModelConfig) -> Counter[Update]:
    """Returns how many layers there are of each kind."""
    return Counter(kind.update for kind in model.layers)


def layer_products[Count: (int, np.ndarray)](
    model: ModelConfig, num_text: Count, num_visual: Count, num_targets: Count, update: Update = "none"
) -> MatrixProducts[Count]:
    """Returns what `matrix_products` does for a layer of the language model, which in `flamingo` sees text alone."""
    num_seen = num_visual * 0 if model.cross_attention else num_visual
    return matrix_products(model, num_text, num_seen, num_targets, update)


def forward_flops[Count: (int, np.ndarray)](
    model: ModelConfig,
    num_text: Count,
    num_visual: Count,
    num_targets: Count | None = None,
    phase: Phase = "finetune",
) -> Count:
    """Returns the FLOPs of one sample's forward pass, or of each sample's for arrays.

    Where layers have projectors, in stage 1 (`pretrain`) one runs once instead. Without `num_targets` every text row
    passes the head, as when logits are asked for.
    """
    sizes = (num_text, num_visual, num_text if num_targets is None else num_targets)
    p = matrix_products(model, *sizes)
    total = num_projectors(model, phase) * (p.projector_in + p.projector_out) + p.head
    for update, count in _updates(model).items():
        p = layer_products(model, *sizes, update)
        total = total + count * (p.linear_q + p.linear_other + p.attention)
    return total + blocks_flops(model, num_text, num_visual)


def training_flops[Count: (int, np.ndarray)](
    model: ModelConfig, phase: Phase, num_text: Count, num_visual: Count, num_targets: Count
) -> Count:
    """Returns the FLOPs of one sample's forward and backward pass, or of each sample's for arrays.

    A linear layer costs its forward again for the gradient of its input, and again for that of its weight; attention
    costs its forward twice more, for the gradients of both products' two inputs. What is frozen has no weight gradient,
    and the vision features no gradient at all. In stage 1 gradients still pass the whole language model on their way to
    the projector, but for the queries of text in the first layer: nothing before them is trained. In `flamingo` they
    pass, in both stages, the layers behind the first block.
    Source: PaLM (arXiv 2204.02311, appendix B) for what model FLOPs are, and 2 x forward for a backward pass.
    """
    sizes = (num_text, num_visual, num_targets)
    p = matrix_products(model, *sizes)
    total = num_projectors(model, phase) * projector_training_flops(p) + passes(model, phase) * p.head
    kinds: Counter[tuple[Update, bool]] = Counter(
        (kind.update, _is_below_blocks(model, number)) for number, kind in enumerate(model.layers)
    )
    for (update, is_below), count in kinds.items():
        p = layer_products(model, *sizes, update)
        total = total + count * layer_training_flops(p, 1 if is_below else passes(model, phase))
    if model.cross_attention:
        return total + 3 * blocks_flops(model, num_text, num_visual)
    if phase == "pretrain" and (first := model.layers[0].update) != "full":
        p = matrix_products(model, *sizes, first)
        # One of the six products of attention, each half of a forward pass's, makes the gradient of the queries.
        total = total - p.linear_q - p.attention // 2
    return total


def _is_below_blocks(model: ModelConfig, layer: int) -> bool:
    """Whether nothing before a layer's end is trained, so that no gradient comes so far."""
    return layer < (model.cross_attention_every or 1) - 1


def passes(model: ModelConfig, phase: Phase) -> int:
    """Returns how often a step does a product of the LLM: forward, for its input's gradient, and for its weight's."""
    return 3 if model.trains_language_model(phase) else 2


def projector_training_flops[Count: (int, np.ndarray)](products: MatrixProducts[Count]) -> Count:
    """Returns the FLOPs of one projector, forward and backward; it is trained in both stages."""
    return 2 * products.projector_in + 3 * products.projector_out


def layer_training_flops[Count: (int, np.ndarray)](products: MatrixProducts[Count], num_passes: int) -> Count:
    """Returns the FLOPs of one layer without projector and block, forward and, with more than one pass, backward."""
    attention = 3 * products.attention if num_passes > 1 else products.attention
    return num_passes * (products.linear_q + products.linear_other) + attention


def stage_costs(
    model: ModelConfig, phase: Phase, num_text: int, num_visual: int, num_targets: int
) -> tuple[list[int], int]:
    """Returns the FLOPs of each layer and of the head for a typical sample: what pipeline stages are evened out by.

    A projector that all stages have is in none of them.
    """
    sizes = (num_text, num_visual, num_targets)
    own, shared, num_passes = model.num_own_projectors > 0, model.shares_projector(phase), passes(model, phase)
    costs = []
    for number, kind in enumerate(model.layers):
        p = layer_products(model, *sizes, kind.update)
        has_projector = (kind.is_projected and not shared) or (number == 0 and kind.takes_from_below and not own)
        cost = layer_training_flops(p, 1 if _is_below_blocks(model, number) else num_passes)
        cost = cost + (projector_training_flops(p) if has_projector else 0)
        costs.append(cost + (3 * block_flops(model, num_text, num_visual) if kind.shown == "block" else 0))
    return costs, num_passes * matrix_products(model, *sizes).head


def encoder_forward_flops(vision: VisionConfig, ffn_hidden_size: int) -> int:
    """Returns the FLOPs of encoding one image; the encoder is frozen and has no backward pass.

    `ffn_hidden_size` is the encoder's own, `intermediate_size` in its Hugging Face configuration. Only the layers up to
    the selected hidden state run. Not for timm's, see `model.vision`. Source: the shapes in `model.hf.vision_saisa`.
    """
    c, num_patches = vision.hidden_size, vision.num_tokens
    num_positions = num_patches + (vision.type == "clip")  # CLIP's class token
    num_layers = vision.select_layer if vision.select_layer >= 0 else vision.num_layers + 1 + vision.select_layer
    patches = num_patches * 3 * vision.patch_size**2 * c
    layer = num_positions * (4 * c * c + 2 * c * ffn_hidden_size) + 2 * num_positions**2 * c
    return 2 * (patches + num_layers * layer)
