"""The kinds of projector, which turn an encoder's features into visual tokens: their weights and what they cost.

| `model.projector` | visual tokens of one image | layers, from the encoder's width C to the model's D           |
|-------------------|----------------------------|---------------------------------------------------------------|
| `mlp`             | the encoder's              | Linear C to D, GELU, Linear D to D                            |
| `linear`          | the encoder's              | Linear C to D (table 7 of the paper)                          |
| `resampler`       | `model.resampler_tokens`   | learned latents attend to the image at width C; Linear C to D |

The paper says no more of its resampler than 256 tokens (table 7). Ours is that of Qwen-VL (arXiv 2308.12966, section
2.1), one cross-attention without an FFN, and a linear layer: 277 million parameters in the 32 layers of Vicuna-7B.
What computes them is in `model.layers` in training and in `model.hf.projectors_saisa` in an export.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from model.config import ModelConfig


class ProjectorWeight(NamedTuple):
    """One parameter of a projector.

    Fields:
        ours: Its name in training, behind the projector's.
        theirs: Its name in Hugging Face format, behind the projector's.
        shape: Of the whole parameter.
        fan_in: Input features of its linear layer; 0 for latents.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    fan_in: int


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
