"""What a step makes a GPU do: every kernel, copy, host wait and collective, and the bytes that are alive.

`Recorder` is a dispatch mode over fake tensors: operations run, without values, and each leaves an event. What needs a
value on the host (`.item()`, an index by a mask, a copy to pageable memory) is a wait, since the host stands still
until the GPU has done all that was asked of it before.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_gpu.traces import Event, Kind

ROOT = str(Path(__file__).resolve().parents[2])
LIBRARIES = ("/megatron/core/", "/transformer_engine/")
ALLOCATION_BYTES = 512  # torch's allocator gives multiples of this
# What runs no kernel, besides views and what makes tensors without values.
FREE = ("_unsafe_view", "lift_fresh", "record_stream", "resize_", "set_")
# What must know values to know the size of its result.
SIZED_BY_VALUES = ("bincount", "equal", "masked_select", "nonzero", "repeat_interleave", "unique_dim", "_unique2")
COPIES = ("_to_copy", "copy_")
FILLS = ("zero_", "fill_", "_foreach_zero_")  # write without reading
INDEXING = ("index", "index_put", "index_put_", "index_put_impl_")
# Coalesced collectives, which torch's fake process group lacks, and what one of them is made of.
COALESCED = {
    "reduce_scatter_tensor_coalesced_": torch.ops.c10d._reduce_scatter_base_.default,
    "allgather_into_tensor_coalesced_": torch.ops.c10d._allgather_base_.default,
}


class Recorder(TorchDispatchMode):
    """Collects the events of what runs inside; counts live bytes for as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forgets all: what is alive now is not counted, nor what happens to it."""
        self.events: list[Event] = []
        self.live_bytes = self.peak_bytes = 0
        self.peak_at = ""
        self.num_true: int | None = None  # in a mask whose size a result has; all of it if nobody says
        self._live: set[int] = set()
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        """Forgets the events; the peak is that of what is alive now."""
        self.events.clear()
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs an operation and leaves its event."""
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if namespace == "c10d":
            return self._communicate(func, name, args, kwargs, tensors)
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        if name in ("_pin_memory", "is_pinned"):
            storage = args[0].untyped_storage()
            return storage in self._pinned if name == "is_pinned" else self._pin(args[0].clone())
        if on_gpu and (name == "_local_scalar_dense" or name in SIZED_BY_VALUES):
            self.add("wait", "item" if name == "_local_scalar_dense" else name, tensors)
        if (answer := self._answer(name, tensors[0] if tensors else None, on_gpu)) is not None:
            return answer
        if on_gpu and name.lstrip("_") in INDEXING:
            args = self._without_masks(name, args, tensors)
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            if tensor.is_cuda:
                self._allocated(tensor, name)
        if name in COPIES:
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            self._copied(name, source, target, bool(non_blocking))
        elif (on_gpu or any(tensor.is_cuda for tensor in made)) and not is_free(func):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self.add("kernel", name, *_read_and_written(name, args, tensors, made), flops)
        return result

    def _answer(self, name: str, tensor: Tensor | None, on_gpu: bool) -> Any:
        """Returns what the operation would tell of values that are not there; None where it needs none."""
        if name == "_local_scalar_dense" and tensor is not None:
            return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)
        if on_gpu and name == "equal":
            return False
        if on_gpu and name == "nonzero" and tensor is not None:
            return tensor.new_empty((self._rows(tensor), tensor.dim()), dtype=torch.long)
        return None

    def _without_masks(self, name: str, args: tuple, tensors: list[Tensor]) -> tuple:
        """Returns the arguments of an indexing operation with row numbers for a mask, after leaving its event."""
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if not masks:
            return args
        fills = "put" in name and args[2].numel() == 1 and not args[2].is_cuda  # torch fills without looking
        self.add("kernel" if fills else "wait", f"{name} by a mask", tensors)
        return args[0], [torch.empty(self._rows(masks[0]), dtype=torch.long, device=args[0].device)], *args[2:]

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(tensor.untyped_storage())
        return tensor

    def add(
        self,
        kind: Kind,
        name: str,
        taken: Iterable[Tensor] = (),
        made: Iterable[Tensor] = (),
        flops: int = 0,
        ranks: tuple[int, ...] = (),
    ) -> None:
        """Leaves an event."""
        tensors = [*taken, *made]
        self.events.append(
            Event(
                kind=kind,
                name=name,
                shapes=tuple(tuple(tensor.shape) for tensor in tensors),
                dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
                num_bytes=sum(_touched_bytes(tensor) for tensor in tensors),
                flops=flops,
                source=source_line(),
                ranks=ranks,
            )
        )

    def watch_synchronizing(self) -> None:
        """Lets what makes the host wait without an operation on a tensor leave its event too."""
        owners: list[Any] = [torch.cuda, torch.cuda.Stream, torch.cuda.Event]
        for owner in owners:
            name = f"{owner.__name__.rpartition('.')[2]}.synchronize"
            owner.synchronize = lambda *_, name=name: self.add("wait", name)

    def counts(self, kind: Kind) -> Counter[tuple[str, str]]:
        """Returns how often each operation of a kind was asked for by each line."""
        return Counter((event.name, event.source) for event in self.events if event.kind == kind)

    def _rows(self, mask: Tensor) -> int:
        return mask.numel() if self.num_true is None else self.num_true

    def _copied(self, name: str, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.is_cuda == target.is_cuda:
            if source.is_cuda:
                self.add("kernel", name, [source], [target])
            return
        host = target if source.is_cuda else source
        direction = "device to host" if source.is_cuda else "host to device"
        if host.untyped_storage() not in self._pinned:
            self.add("wait", f"{direction}, pageable", [source])
        elif non_blocking:
            self.add("copy", direction, [source])
        else:
            self.add("wait", f"{direction}, blocking", [source])

    def _communicate(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = torch.distributed.get_process_group_ranks(torch.distributed.ProcessGroup.unbox(group))
        single = COALESCED.get(name)
        pairs = [*zip(*args[:2], strict=True)] if single else [tensors]  # a bucket of each type of weights
        wholes = [max(pair, key=torch.Tensor.numel) for pair in pairs]
        self.add("collective", name.strip("_"), wholes, ranks=tuple(ranks))
        if single is None:
            return func(*args, **kwargs)
        return [single(*pair, *args[2:], **kwargs) for pair in pairs][-1][-1]

    def _allocated(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._live.add(key)
        self.live_bytes += num_bytes
        weakref.finalize(storage, self._freed, self._live, key, num_bytes)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_at = f"{name} {tuple(tensor.shape)} {source_line()}"

    def _freed(self, live: set[int], key: int, num_bytes: int) -> None:
        live.discard(key)
        if live is self._live:  # and not of what was forgotten
            self.live_bytes -= num_bytes


def is_free(func: Any) -> bool:
    """Whether an operation runs no kernel: it makes a view, or a tensor without values, or tells something."""
    name, returns = func._schema.name.partition("::")[2], func._schema.returns
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    tells = not any("Tensor" in str(value.type) for value in returns) and not name.startswith("_foreach")
    return is_view or tells or name in FREE or name.startswith(("empty", "new_empty"))


def source_line() -> str:
    """Returns the line of this repository that is being run, and after it the library's line; "backward" without."""
    library, frame = "", sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/.venv/" not in name and "/fake_gpu/" not in name:
            own = f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
            return f"{own} ({library})" if library else own
        if not library and (at := max(name.find(part) for part in LIBRARIES)) >= 0:
            library = f"{name[at + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return f"backward ({library})" if library else "backward"


def _read_and_written(
    name: str, args: tuple, tensors: list[Tensor], made: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what a kernel reads and what it writes; of a tensor that it picks rows from, as much as the rows are."""
    if name in FILLS:
        return [], tensors
    if name in ("index_select", "embedding"):
        indices = args[2 if name == "index_select" else 1]
        return [indices, *made], made
    if name == "index_add_":
        _, _, indices, rows = args
        return [indices, rows, rows], [rows]
    return tensors, made


def _touched_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor that a kernel reads or writes; those of an expanded one are fewer than its size."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
