"""The frozen vision encoder in training: pixels to the features Z that every layer's projector reads.

It is never trained, so its work lies outside autograd, and outside the model: a step encodes the images of its packs
first and hands the features over. The encoder itself is the one that exported folders carry.

Dims: B images, C vision width, P visual tokens an image, I = B * P.
"""

from pathlib import Path

import torch
from torch import Tensor

from model.hf.configuration_saisa import SaisaConfig
from model.hf.vision_saisa import VisionTower
from model.weights import read_safetensors

PREFIX = "model.vision_tower."


def load_vision_tower(base: Path, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Returns the encoder stored in a base folder.

    Raises:
        ValueError: weights are missing.
    """
    config = SaisaConfig.from_pretrained(base)
    tower = VisionTower(config.vision_config, config.vision_select_layer)
    stored = read_safetensors(base, lambda name: name.startswith(PREFIX))
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored}
    missing = sorted(set(tower.state_dict()) - set(weights))
    if missing:
        raise ValueError(f"{base}: the vision encoder lacks {len(missing)} weights, such as {PREFIX}{missing[0]}")
    tower.load_state_dict(weights, strict=False)
    return tower.to(device, dtype)


def encode_images(tower: VisionTower, pixels_B3HW: Tensor, image_batch_size: int, width: int) -> Tensor:
    """Returns the features [I, C] of normalised images, at most `image_batch_size` encoded at once; C is `width`."""
    if not len(pixels_B3HW):
        return pixels_B3HW.new_zeros(0, width)
    return torch.cat([tower(window) for window in pixels_B3HW.split(image_batch_size)]).flatten(0, 1)
