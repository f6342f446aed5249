"""The kinds of projector, which turn an encoder's features into visual tokens: their weights and what they cost.

| `model.projector` | visual tokens of one image | layers, from the encoder's width C to the model's D           |
|-------------------|----------------------------|---------------------------------------------------------------|
| `mlp`             | the encoder's              | Linear C to D, GELU, Linear D to D                            |
| `linear`          | the encoder's              | Linear C to D (table 7 of the paper)                          |
| `resampler`       | `model.resampler_tokens`   | learned latents attend to the image at width C; Linear C to D |

What stands in front of the blocks of `open_flamingo` is its own resampler: latents of width C that attend to the image
and to each other in 6 layers, each with an FFN, and no linear layer (arXiv 2204.14198, section 2.1).

The paper says no more of its resampler than 256 tokens (table 7). Ours is that of Qwen-VL (arXiv 2308.12966, section
2.1), one cross-attention without an FFN, and a linear layer: 277 million parameters in the 32 layers of Vicuna-7B.
What computes them is in `model.layers` in training and in `model.hf.projectors_saisa` in an export.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from model.config import ModelConfig
from model.hf.family_saisa import FFN_WIDTHS, HEAD_DIM, NUM_HEADS, NUM_RESAMPLER_LAYERS


class ProjectorWeight(NamedTuple):
    """One parameter of a projector.

    Fields:
        ours: Its name in training, behind the projector's.
        theirs: Its name in Hugging Face format, behind the projector's.
        shape: Of the whole parameter.
        fan_in: Input features of its linear layer; 0 for latents.
        value: What all of a new one starts at, if it is of a norm.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    fan_in: int
    value: float | None = None


@dataclass(frozen=True)
class ProjectorPlan:
    """A projector by its sizes.

    Attributes:
        weights: Its parameters.
        products_in: Multiplications for one image of products whose input is frozen, so that nobody asks for its
            gradient.
        products_out: Multiplications for one image of all others.
    """

    weights: tuple[ProjectorWeight, ...]
    products_in: int
    products_out: int

    @property
    def num_parameters(self) -> int:
        """Parameters of one projector."""
        return sum(prod(weight.shape) for weight in self.weights)


def projector_plan(model: ModelConfig) -> ProjectorPlan:
    """Returns what one projector of a model consists of and costs.

    In a resampler latents ask, so its queries do not depend on the image: they are counted for each image, though a
    pack makes them once.
    """
    c, d = model.vision.hidden_size, model.hidden_size
    num_features, num_tokens = model.vision.num_tokens, model.num_tokens_per_image
    if model.cross_attention == "open_flamingo":
        return _perceiver_plan(c, num_features, num_tokens)
    if model.projector == "mlp":
        weights = (*_linear("fc1.", "0.", c, d), *_linear("fc2.", "2.", d, d))
        return ProjectorPlan(weights, num_tokens * c * d, num_tokens * d * d)
    if model.projector == "linear":
        return ProjectorPlan(_linear("linear.", "", c, d), num_tokens * c * d, 0)
    latents = ProjectorWeight("resampler.latents", "0.latents", (num_tokens, c), 0)
    names = ("query.", "key.", "value.", "output.")
    inner = [weight for name in names for weight in _linear(f"resampler.{name}", f"0.{name}", c, c)]
    inner = [weight for weight in inner if weight.ours != "resampler.key.bias"]  # the softmax would not notice it
    attention = 2 * num_tokens * num_features * c
    products_out = 2 * num_tokens * c * c + attention + num_tokens * c * d
    return ProjectorPlan((latents, *inner, *_linear("linear.", "1.", c, d)), 2 * num_features * c * c, products_out)


def _linear(ours: str, theirs: str, num_in: int, num_out: int) -> tuple[ProjectorWeight, ProjectorWeight]:
    """Returns weight and bias of a linear layer."""
    weight = ProjectorWeight(f"{ours}weight", f"{theirs}weight", (num_out, num_in), num_in)
    return weight, ProjectorWeight(f"{ours}bias", f"{theirs}bias", (num_out,), num_in)


def _perceiver_plan(c: int, num_features: int, num_latents: int) -> ProjectorPlan:
    """Returns the resampler of `open_flamingo`, whose every product has an input that is trained, if only by a norm."""
    inner = NUM_HEADS * HEAD_DIM
    shapes = {name: (inner, c) for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": (c, inner)}
    shapes |= {"fc1": (FFN_WIDTHS * c, c), "fc2": (c, FFN_WIDTHS * c)}
    weights = [ProjectorWeight("resampler.latents", "latents", (num_latents, c), 0), *_norm("norm", c)]
    for layer in range(NUM_RESAMPLER_LAYERS):
        prefix = f"layers.{layer}."
        for norm in ("feature_norm", "latent_norm", "ffn_norm"):
            weights += _norm(prefix + norm, c)
        for name, shape in shapes.items():
            own = f"{prefix}{name}.weight"
            weights.append(ProjectorWeight(f"resampler.{own}", own, shape, shape[1]))
    num_keys = num_features + num_latents
    linear = 2 * num_latents * c * inner + 2 * num_keys * c * inner + 2 * num_latents * FFN_WIDTHS * c * c
    attention = 2 * num_latents * num_keys * inner
    return ProjectorPlan(tuple(weights), 0, NUM_RESAMPLER_LAYERS * (linear + attention))


def _norm(name: str, width: int) -> list[ProjectorWeight]:
    """Returns weight and bias of a LayerNorm of the resampler."""
    values = {"weight": 1.0, "bias": 0.0}
    return [ProjectorWeight(f"resampler.{name}.{k}", f"{name}.{k}", (width,), 0, value) for k, value in values.items()]
