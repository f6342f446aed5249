"""Traces of steps on a fake GPU, each made when a test first asks for it, in one process for all tests."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import pytest

from benchmarks.fake_gpu.traces import Case, Trace, tracing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of a module's `SLOW` cases so, by the names among their parameters."""
    for item in items:
        slow = getattr(getattr(item, "module", None), "SLOW", ())
        for value in cast(Any, item).callspec.params.values() if slow and hasattr(item, "callspec") else ():
            if any(name in slow for name in (value if isinstance(value, tuple) else (value,))):
                item.add_marker(pytest.mark.slow)


class Traces(dict[str, Trace]):
    """The traces of named cases."""

    def __init__(self, cases: dict[str, Case], trace: Callable[[Case], Trace]) -> None:
        super().__init__()
        self._cases, self._trace = cases, trace

    def __missing__(self, name: str) -> Trace:
        self[name] = found = self._trace(self._cases[name])
        return found


@pytest.fixture(scope="session")
def tracer() -> Iterator[Callable[[Case], Trace]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as some clusters do: torch then asks the driver for GPUs
        with tracing() as trace:
            yield cache(trace)


@pytest.fixture(scope="module")
def traces(request: pytest.FixtureRequest, tracer: Callable[[Case], Trace]) -> Traces:
    """The traces of a module's `CASES`."""
    return Traces(request.module.CASES, tracer)
