"""What SAISA costs, from the sizes alone: parameters and FLOPs. `model.memory` says what it holds.

Model FLOPs are counted: the multiplications and additions of every matrix product once, forward and backward, two a
pair; norms, activations and the softmax as none, work that is done again to save memory not at all. Attention is
counted for full rectangles, as the paper does (arXiv 2502.02458, appendix A.2): a causal kernel does less. Sizes may be
numbers or arrays with one entry a sample; rows of padding are not counted unless they are in the sizes. The frozen
vision encoder is a figure of its own.

Symbols: t text tokens, v visual tokens, s = t + v keys, r targets of a sample; D hidden, N query heads, G key/value
heads, H head dim, F FFN, C vision width, V vocabulary filled up to `VOCABULARY_MULTIPLE`.
"""

from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig, Phase, VisionConfig
from model.parallel import padded_vocab_size


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model without the vision encoder.

    Attributes:
        projectors: n projectors, or the one that all layers share.
        layers: all layers, without projectors.
        embedding: the token embedding.
        head: the output layer; 0 where it is tied to the embedding.
        final_norm: the norm before the head.
        num_trained: what the phase trains.
    """

    projectors: int
    layers: int
    embedding: int
    head: int
    final_norm: int
    num_trained: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projectors + self.layers + self.embedding + self.head + self.final_norm


def parameter_counts(model: ModelConfig, phase: Phase) -> ParameterCounts:
    """Returns the parameters of a model and how many of them a phase trains.

    Source: the shapes in `model.saisa`; which are trained: arXiv 2502.02458, section 4.
    """
    d, c = model.hidden_size, model.vision.hidden_size
    projector = c * d + d + (d * d + d if model.projector == "mlp" else 0)
    queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
    bias = queries + keys_values if model.qkv_bias else 0
    layer = 2 * d + d * (2 * queries + keys_values) + bias + 3 * d * model.ffn_hidden_size
    vocabulary = padded_vocab_size(model) * d
    projectors = projector * (1 if phase == "pretrain" else model.num_layers)
    counts = dict(
        projectors=projectors,
        layers=model.num_layers * layer,
        embedding=vocabulary,
        head=0 if model.tie_embeddings else vocabulary,
        final_norm=d,
    )
    return ParameterCounts(**counts, num_trained=projectors if phase == "pretrain" else sum(counts.values()))


@dataclass(frozen=True)
class MatrixProducts[Count: (int, np.ndarray)]:
    """FLOPs of the matrix products of one forward pass, each a multiply and an add: 2 x rows x inputs x outputs.

    Attributes:
        projector_in: C to D, of one projector. Its input is frozen: its backward has no input gradient.
        projector_out: D to D, of one projector; 0 where the projector is one linear layer.
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
    model: ModelConfig, num_text: Count, num_visual: Count, num_targets: Count
) -> MatrixProducts[Count]:
    """Returns the FLOPs of every matrix product of a forward pass.

    Source: arXiv 2502.02458, appendix A.2. Visual tokens pay for the projector and for keys and values; queries,
    attention output and the FFN are text only. The head, as in `model.saisa`, sees rows with a target only.
    """
    d, c = model.hidden_size, model.vision.hidden_size
    queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
    num_keys = num_text + num_visual
    return MatrixProducts(
        projector_in=2 * num_visual * c * d,
        projector_out=2 * num_visual * (d * d if model.projector == "mlp" else 0),
        linear_q=2 * num_text * d * queries,
        linear_other=2 * (num_keys * d * keys_values + num_text * (queries * d + 3 * d * model.ffn_hidden_size)),
        attention=2 * 2 * num_text * num_keys * queries,
        head=2 * num_targets * d * padded_vocab_size(model),
    )


def forward_flops[Count: (int, np.ndarray)](
    model: ModelConfig,
    num_text: Count,
    num_visual: Count,
    num_targets: Count | None = None,
    phase: Phase = "finetune",
) -> Count:
    """Returns the FLOPs of one sample's forward pass, or of each sample's for arrays.

    In stage 1 (`pretrain`) one projector runs once; otherwise each layer has its own. Without `num_targets` every text
    row passes the head, as when logits are asked for.
    """
    products = matrix_products(model, num_text, num_visual, num_text if num_targets is None else num_targets)
    num_projectors = 1 if phase == "pretrain" else model.num_layers
    projector = products.projector_in + products.projector_out
    layer = products.linear_q + products.linear_other + products.attention
    return num_projectors * projector + model.num_layers * layer + products.head


def training_flops[Count: (int, np.ndarray)](
    model: ModelConfig, phase: Phase, num_text: Count, num_visual: Count, num_targets: Count
) -> Count:
    """Returns the FLOPs of one sample's forward and backward pass, or of each sample's for arrays.

    A linear layer costs its forward again for the gradient of its input, and again for that of its weight; attention
    costs its forward twice more, for the gradients of both products' two inputs. What is frozen has no weight gradient,
    and the vision features no gradient at all. In stage 1 gradients still pass the whole language model on their way to
    the shared projector, but for the queries of the first layer: nothing before them is trained.
    Source: PaLM (arXiv 2204.02311, appendix B) for what model FLOPs are, and 2 x forward for a backward pass.
    """
    p = matrix_products(model, num_text, num_visual, num_targets)
    n, is_trained = model.num_layers, phase == "finetune"
    num_projectors, passes = (n, 3) if is_trained else (1, 2)
    num_query_gradients = n if is_trained else n - 1
    projectors = num_projectors * (2 * p.projector_in + 3 * p.projector_out)
    queries = (n + num_query_gradients + (n if is_trained else 0)) * p.linear_q
    # Two products forward and four backward, one of which makes the gradient of the queries.
    attention = (5 * n + num_query_gradients) * (p.attention // 2)
    return projectors + queries + attention + passes * (n * p.linear_other + p.head)


def stage_costs(model: ModelConfig, phase: Phase, num_text: int, num_visual: int, num_targets: int) -> tuple[int, int]:
    """Returns the FLOPs of one layer and of the head for a typical sample: what pipeline stages are evened out by."""
    sizes = (phase, num_text, num_visual)
    one, two = (training_flops(model.model_copy(update={"num_layers": n}), *sizes, num_targets) for n in (1, 2))
    headless = training_flops(model.model_copy(update={"num_layers": 1}), *sizes, 0)
    return two - one, one - headless


def encoder_forward_flops(vision: VisionConfig, ffn_hidden_size: int) -> int:
    """Returns the FLOPs of encoding one image; the encoder is frozen and has no backward pass.

    `ffn_hidden_size` is the encoder's own, `intermediate_size` in its Hugging Face configuration. Only the layers up to
    the selected hidden state run. Source: the shapes in `model.hf.vision_saisa`.
    """
    c, num_patches = vision.hidden_size, vision.num_tokens
    num_positions = num_patches + (vision.type == "clip")  # CLIP's class token
    num_layers = vision.select_layer if vision.select_layer >= 0 else vision.num_layers + 1 + vision.select_layer
    patches = num_patches * 3 * vision.patch_size**2 * c
    layer = num_positions * (4 * c * c + 2 * c * ffn_hidden_size) + 2 * num_positions**2 * c
    return 2 * (patches + num_layers * layer)
