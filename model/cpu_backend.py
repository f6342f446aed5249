"""Makes the `cuda` assumptions of megatron-core 0.19 true on a machine without a GPU; on a GPU it does nothing.

Megatron-core writes `device="cuda"` and `torch.cuda.current_device()` into its buffers, schedules and optimizers, and
compares `param.type()` with names such as `torch.cuda.FloatTensor`. `use_cpu_as_cuda()` answers these with the CPU, so
that the same layers, DDP, distributed optimizer, schedules and checkpoints run there, on gloo.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Sends `device="cuda"` (or a device number) and `.cuda()` to the CPU; names types as their CUDA twins."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A stream of a device that has only one order of execution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...
    def synchronize(self) -> None: ...


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or type(device) is int


_installed: list[_CudaMeansCpu] = []


def use_cpu_as_cuda() -> None:
    """Lets megatron-core run on the CPU of this process, from here on. Does nothing where there is a GPU."""
    if torch.cuda.is_available() or _installed:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.current_stream = _Stream
    cuda.Stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
