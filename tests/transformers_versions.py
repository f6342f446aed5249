"""What transformers 4.57 and 5 name differently, where a test compares with them."""

from typing import Any

import transformers
from torch import nn

MAJOR = int(transformers.__version__.partition(".")[0])

# Those of 5 resize with torchvision, which rounds in another way; the ones with Pillow have names of their own there.
CLIPImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
SiglipImageProcessor: Any = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)


def encoder_inside(model: nn.Module) -> Any:
    """Returns the module of an encoder that has the layers: a part of it in 4.57, the encoder itself in 5."""
    return getattr(model, "vision_model", model)
