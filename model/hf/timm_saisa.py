"""A frozen encoder of the library timm, if its features are a square grid: a convolutional network or a transformer.

The folder has its weights and the name of its architecture; `pip install timm` brings the code. Nothing is downloaded.

Dims: N images, H x W pixels, P places of the grid, C vision width.
"""

import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .vision_saisa import FrozenLinear, VisionTower

PLAIN_NAME = re.compile(r"[a-z0-9_]+")  # timm takes others for addresses, and downloads from there


def build_trunk(architecture: str) -> Any:
    """Returns an encoder of timm without its classifier, with random weights.

    Raises:
        ImportError: timm is not installed.
        ValueError: It has no encoder of this name.
    """
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise ImportError(
            f"the vision encoder is timm's {architecture}, and timm is not here: pip install timm"
        ) from error
    if not PLAIN_NAME.fullmatch(str(architecture)) or not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {str(architecture)[:60]!r}; install the newest")
    trunk = timm.create_model(architecture, pretrained=False, num_classes=0)
    if not hasattr(trunk, "forward_intermediates"):
        raise ValueError(f"timm's {architecture} does not give features of its layers; use another encoder")
    for module in trunk.modules():
        if hasattr(module, "num_batches_tracked"):  # a number for training alone, and no weight that a folder holds
            module.num_batches_tracked = None
        if type(module) is nn.Linear:  # tools that adapt or quantise these are to pass by
            module.__class__ = FrozenLinear  # pyright: ignore[reportAttributeAccessIssue]
    return trunk


def hidden_states(trunk: Any, pixels_N3HW: Tensor, index: int | None = None) -> list[Tensor]:
    """Returns the features [N, C, h, w] behind every stage or block, or behind the one of that index alone."""
    indices = None if index is None else [index]
    return trunk.forward_intermediates(
        pixels_N3HW, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


class TimmTower(nn.Module):
    """Pixels to the features Z that projectors read, as `VisionTower`; layers behind the selected one are left out."""

    def __init__(self, config: Any, select_layer: int) -> None:
        super().__init__()
        self.image_size, self.width = config.image_size, config.hidden_size
        # As for other encoders hidden state 0 is what comes before all layers, so layer i leaves state i + 1.
        self.index = (select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer) - 1
        if self.index < 0:
            raise ValueError(f"vision_select_layer={select_layer} of timm's {config.architecture} is before all layers")
        self.trunk = build_trunk(config.architecture)
        self.trunk.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "TimmTower":
        """Stays as it is: statistics of batches would change in training."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Returns the features [N, P, C] of normalised pixels, row by row of the grid.

        Raises:
            ValueError: The images do not have the configured size.
        """
        if tuple(pixels_N3HW.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values has shape {list(pixels_N3HW.shape)}; the vision encoder takes [num_images, 3, "
                f"{self.image_size}, {self.image_size}]; use the checkpoint's own processor"
            )
        weight = next(self.trunk.parameters())
        device = pixels_N3HW.device if weight.device.type == "meta" else weight.device
        features_NChw = hidden_states(self.trunk, pixels_N3HW.to(device, weight.dtype), self.index)[-1]
        return features_NChw.flatten(2).transpose(1, 2)


def build_tower(config: Any, select_layer: int) -> VisionTower | TimmTower:
    """Returns the encoder that a configuration describes, with weights to be loaded."""
    return (TimmTower if config.model_type == "timm_grid" else VisionTower)(config, select_layer)
