"""Traces of steps on a fake GPU, each made when a test first asks for it, in one process for all tests."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from benchmarks.fake_gpu.traces import Case, Trace, tracing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of a module's `SLOW` cases so, by the names among their parameters."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        names = {name for value in parameters for name in (value if isinstance(value, tuple) else (value,))}
        if names & set(getattr(getattr(item, "module", None), "SLOW", ())):
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
    with tracing() as trace:
        yield cache(trace)


@pytest.fixture(scope="module")
def traces(request: pytest.FixtureRequest, tracer: Callable[[Case], Trace]) -> Traces:
    """The traces of a module's `CASES`."""
    return Traces(request.module.CASES, tracer)
