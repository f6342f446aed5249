"""How long the parts of a step take, without a wait of its own, and ranges of the same names for profilers.

    with state.phases("encode"):
        ...

On a GPU two events mark a part, and their times are read where the host waits for the GPU anyway, once a step. What is
behind that wait (the update of the weights, a save) is therefore told with the step after it. Without a GPU a monotonic
clock does the same.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.profiler import record_function


class Phases:
    """The seconds of each part of a step since the last `read`; a part that comes several times is added up."""

    def __init__(self, device: torch.device | None = None, nvtx: bool = False) -> None:
        self.on_gpu, self.nvtx = device is not None and device.type == "cuda", nvtx
        self._marks: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        if self.nvtx:
            torch.cuda.nvtx.range_push(name)
        is_recorded = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        named = record_function(name) if is_recorded else nullcontext()
        begin = self._mark()
        try:
            with named:
                yield
        finally:
            self._marks.append((name, begin, self._mark()))
            if self.nvtx:
                torch.cuda.nvtx.range_pop()

    def around[**P, Result](self, name: str, function: Callable[P, Result]) -> Callable[P, Result]:
        """Returns the function, timed."""

        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> Result:
            with self(name):
                return function(*args, **kwargs)

        return timed

    def add(self, name: str, seconds: float) -> None:
        """Adds what the host has timed."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Returns the seconds by name, and begins anew; to be called where the GPU has done all that was marked."""
        for name, begin, end in self._marks:
            self.add(name, begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin)
        found, self._marks, self._seconds = self._seconds, [], {}
        return found

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def own_seconds(phases: dict[str, float]) -> float:
    """Returns how long a process was busy before it waited for the others: reading, encoding, both passes.

    `reduce`, within the passes, ends only once the slowest process has come as far.
    """
    busy = sum(phases.get(name, 0.0) for name in ("data", "encode", "forward_backward"))
    return busy - phases.get("reduce", 0.0)


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Returns the rank that took the longest, and by what fraction longer than the mean."""
    mean = sum(seconds) / len(seconds)
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return rank, seconds[rank] / mean - 1 if mean > 0 else 0.0
