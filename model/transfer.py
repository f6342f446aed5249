"""Between host and device: many small tensors in one copy, out of pinned memory, so that nobody waits.

A copy out of pageable memory makes the host wait for all that it has asked of the GPU, whatever `non_blocking` says;
one out of pinned memory does not. Torch keeps a pinned buffer until the copy out of it is done.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: of the largest element, and of what kernels load at once


def copy_together(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns the tensors on `device`, under their names; from host memory in one copy, for which nobody waits."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    parts = list(zip(tensors.items(), [0, *ends], sizes, strict=False))
    for (_, tensor), start, size in parts:
        pinned[start : start + size].view(tensor.dtype).copy_(tensor.flatten())
    moved = pinned.to(device, non_blocking=True)
    return {
        name: moved[start : start + size].view(tensor.dtype).view(tensor.shape) for (name, tensor), start, size in parts
    }


def read_values(tensor: Tensor) -> list[float]:
    """Returns the values of a small tensor; from a GPU in one copy, for which the host waits."""
    return tensor.to("cpu").tolist()
