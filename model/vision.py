"""The frozen vision encoder in training: pixels to the features Z that every layer's projector reads.

It is never trained, so its work lies outside autograd, outside the model and outside the pipeline: before a step, the
processes that share a replica of the model encode its images together, each some of them, and all get all features.
The encoder itself is the one that exported folders carry.

Dims: B images, C vision width, P visual tokens an image, I = B * P.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import QuickGELUActivation

from model.backend import has_fused_kernels, quick_gelu
from model.compute import compute_dtype
from model.config import ComputeConfig, VisionConfig
from model.flops import encoder_forward_flops
from model.hf.timm_saisa import TimmTower, build_tower
from model.hf.vision_saisa import MLP, VisionTower, stored_name
from model.hf_read import load_config
from model.weights import read_safetensors

PREFIX = "model.vision_tower."
Tower = VisionTower | TimmTower


def load_vision_tower(base: Path, dtype: torch.dtype, device: torch.device) -> Tower:
    """Returns the encoder stored in a base folder.

    Raises:
        ValueError: weights are missing.
    """
    config = load_config(base)
    with torch.device("meta"):
        state = build_tower(config.vision_config, config.vision_select_layer).state_dict()
    stored = read_safetensors(base, lambda name: name.startswith(PREFIX))
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored}
    for name, expected in ((stored_name(name), tensor.shape) for name, tensor in state.items()):
        if name not in weights:
            raise ValueError(f"{base}: the vision encoder lacks weights, such as {PREFIX}{name}")
        if weights[name].shape != expected:
            told = f"shape {list(weights[name].shape)}, by config.json it is {list(expected)}"
            raise ValueError(f"{base}: {PREFIX}{name} has {told}; make the base again")
    tower = build_tower(config.vision_config, config.vision_select_layer)
    tower.load_state_dict(weights, strict=False)
    return tower.to(device, dtype)


def fuse_activations(tower: Tower, compute: ComputeConfig) -> None:
    """Lets an encoder compute CLIP's activation in one kernel, where Transformer Engine has it."""
    if not has_fused_kernels(compute, compute_dtype(compute)):
        return
    for module in tower.modules():
        if isinstance(module, MLP) and isinstance(module.activation, QuickGELUActivation):
            module.activation = quick_gelu()


def flops_per_image(base: Path, vision: VisionConfig) -> int:
    """Returns the FLOPs of encoding one image with the encoder of a base folder; timm's are counted, not worked out."""
    config = load_config(base)
    stored = config.vision_config
    if vision.type == "timm":
        with torch.device("meta"):
            tower = build_tower(stored, config.vision_select_layer)
            pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            tower(pixels)
        return counter.get_total_flops()
    return encoder_forward_flops(vision, stored.intermediate_size)


def encode_together(
    encode: Callable[[Tensor], Tensor], share_B3HW: Tensor, num_images: int, window: int, group: ProcessGroup
) -> Tensor:
    """Returns the features [num_images, P, C] on every process of a group, each of which encoded its share.

    Image j is the work of process j % size, so all do the same to within one image, and none does another's. At most
    `window` images of a process are encoded and exchanged at once.

    Args:
        encode: pixels [b, 3, H, W] to features [b, P, C], for b >= 1.
        share_B3HW: this process's images, in order.
        num_images: images of all the processes.
        window: images.
        group: the processes.
    """
    size = group.size()
    windows = []
    for start in range(0, -(-num_images // size), window):
        length = min(window, -(-num_images // size) - start)
        mine_B3HW = share_B3HW[start : start + length]
        if len(mine_B3HW) < length:  # others have one more image than this process; it encodes a black one instead
            mine_B3HW = torch.cat([mine_B3HW, mine_B3HW.new_zeros(1, *mine_B3HW.shape[1:])])
        mine_BPC = encode(mine_B3HW)
        all_BPC = mine_BPC.new_empty(size * length, *mine_BPC.shape[1:])
        torch.distributed.all_gather_into_tensor(all_BPC, mine_BPC.contiguous(), group=group)
        windows.append(all_BPC.unflatten(0, (size, length)).transpose(0, 1).flatten(0, 1))
    return torch.cat(windows)[:num_images]
