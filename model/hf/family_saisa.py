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

Source: arXiv 2502.02458, sections 3 and 4; `shortv`: arXiv 2504.00502.
"""

from functools import cache
from typing import Literal, NamedTuple, get_args

Architecture = Literal["saisa", "llava", "naavit", "shortv"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
Update = Literal["none", "ffn", "full"]
"""What visual tokens pass in a layer, as text tokens do: nothing, the FFN, or attention and the FFN."""


class LayerKind(NamedTuple):
    """What one layer does with visual tokens.

    Fields:
        is_projected: It takes vision features, by a projector of its own; otherwise it takes what the layer below left.
        update: What they pass on their way to the layer above.
    """

    is_projected: bool
    update: Update


@cache
def layer_kinds(
    architecture: Architecture, num_layers: int, frozen_layers: tuple[int, ...], block_size: int
) -> tuple[LayerKind, ...]:
    """Returns what each layer does.

    Args:
        architecture: One of the family.
        num_layers: Of the language model.
        frozen_layers: Those that leave visual tokens as they are; of `shortv`.
        block_size: Layers that share one visual input; of `saisa`.
    """
    updates: dict[Architecture, Update] = {"saisa": "ffn", "naavit": "ffn", "llava": "full", "shortv": "full"}
    block = block_size if architecture == "saisa" else num_layers
    kinds = []
    for layer in range(num_layers):
        is_read = (layer + 1) % block and layer + 1 < num_layers
        update = updates[architecture] if is_read and layer not in frozen_layers else "none"
        kinds.append(LayerKind(architecture == "saisa" and layer % block == 0, update))
    return tuple(kinds)
