"""The family of architectures: they differ only in what each layer does with visual tokens.

| architecture | a layer takes them from                        | and leaves them for the layer above              |
|--------------|------------------------------------------------|--------------------------------------------------|
| `saisa`      | the vision features, by a projector of its own | not at all                                       |
| ... blocks   | the same, the first of a block; others below   | behind its FFN, inside a block                   |
| `naavit`     | the layer below; the first from the projector  | behind its FFN                                   |
| `llava`      | the same                                       | behind its attention and FFN, as text tokens     |
| `shortv`     | the same                                       | the same, or as they came if the layer is frozen |

In every layer text tokens attend to the visual tokens that come in. What leaves a layer is not computed where nothing
reads it: before a layer with a projector of its own, and behind the last.

`flamingo` has no visual tokens: its layers attend to text alone, and before every k-th stands a block in which text
attends to the vision features (`flamingo_saisa`).

Source: arXiv 2502.02458, sections 2 to 4; `shortv`: arXiv 2504.00502; `flamingo`: arXiv 2204.14198.
"""

from functools import cache
from typing import Literal, NamedTuple, get_args

Architecture = Literal["saisa", "llava", "naavit", "shortv", "flamingo"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
Update = Literal["none", "ffn", "full"]
"""What visual tokens pass in a layer, as text tokens do: nothing, the FFN, or attention and the FFN."""
CrossAttention = Literal["open_flamingo", "llama_3_2"]
CROSS_ATTENTIONS: tuple[CrossAttention, ...] = get_args(CrossAttention)
# Of `open_flamingo`: heads of a block and of the resampler, latents and layers of that, and the FFN of both, in widths.
NUM_HEADS, HEAD_DIM, NUM_LATENTS, NUM_RESAMPLER_LAYERS, FFN_WIDTHS = 8, 64, 64, 6, 4
Shown = Literal["layer", "block", "nowhere"]
"""Where text sees images: in the layer's own attention, in a block of cross-attention before it, or not at all."""


class LayerKind(NamedTuple):
    """What one layer does with visual tokens.

    Fields:
        is_projected: It takes vision features, by a projector of its own; otherwise it takes what the layer below left.
        update: What they pass on their way to the layer above.
        shown: Where text sees images.
    """

    is_projected: bool
    update: Update
    shown: Shown = "layer"

    @property
    def takes_from_below(self) -> bool:
        """Whether it takes visual tokens that the layer below left."""
        return self.shown == "layer" and not self.is_projected

    @property
    def takes_features(self) -> bool:
        """Whether it takes vision features, itself or in a block before it."""
        return self.is_projected or self.shown == "block"


@cache
def layer_kinds(
    architecture: Architecture,
    num_layers: int,
    frozen_layers: tuple[int, ...],
    block_size: int,
    cross_attention_every: int | None = None,
) -> tuple[LayerKind, ...]:
    """Returns what each layer does.

    Args:
        architecture: One of the family.
        num_layers: Of the language model.
        frozen_layers: Those that leave visual tokens as they are; of `shortv`.
        block_size: Layers that share one visual input; of `saisa`.
        cross_attention_every: A block stands before the last of so many layers, as in OpenFlamingo and Llama 3.2; of
            `flamingo`.
    """
    if architecture == "flamingo":
        assert cross_attention_every is not None
        has_block = [(layer + 1) % cross_attention_every == 0 for layer in range(num_layers)]
        return tuple(LayerKind(False, "none", "block" if block else "nowhere") for block in has_block)
    updates: dict[Architecture, Update] = {"saisa": "ffn", "naavit": "ffn", "llava": "full", "shortv": "full"}
    block = block_size if architecture == "saisa" else num_layers
    kinds = []
    for layer in range(num_layers):
        is_read = (layer + 1) % block and layer + 1 < num_layers
        update = updates[architecture] if is_read and layer not in frozen_layers else "none"
        kinds.append(LayerKind(architecture == "saisa" and layer % block == 0, update))
    return tuple(kinds)
