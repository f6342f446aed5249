"""Which steps to trace, what a trace is, and the process of its own that a fake GPU needs.

Nothing here imports torch: a process must have its fake GPU before anything asks torch for one.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
WAITS_OF_A_STEP = {"model/transfer.py, read_values": 1}
"""Where the host waits for the GPU in a step, and how often, as the traces show."""

Kind = Literal["kernel", "copy", "wait", "collective"]


@dataclass(frozen=True)
class Event:
    """One thing that the GPU or the host does.

    Attributes:
        kind: "wait" is the host's; "copy" is between host and device, without a wait.
        name: the operation of torch or Transformer Engine.
        shapes: of the tensors it takes, then of those it makes.
        dtypes: of the same.
        num_bytes: read and written by a kernel; of the payload, otherwise.
        flops: of matrix products and attention, two for a multiply and an add; 0 for all else.
        source: the line of this repository that asked, and of the library that it asked; "backward" where autograd did.
        ranks: the processes of a collective.
    """

    kind: Kind
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    num_bytes: int
    flops: int
    source: str
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """What each process is given in a step: `num_packs` packs of `num_samples` equal samples.

    Attributes:
        num_text: text tokens of a sample.
        num_images: images of a sample.
        target_fraction: of the text tokens, how many have a target.
    """

    num_packs: int = 1
    num_samples: int = 16
    num_text: int = 256
    num_images: int = 1
    target_fraction: float = 0.5

    @property
    def num_targets(self) -> int:
        """Text tokens of a sample that have a target."""
        return int(self.num_text * self.target_fraction)


@dataclass(frozen=True)
class Case:
    """A step to trace: as `rank` of `world_size` processes, with settings of the recipe changed by `overrides`.

    With `is_resumed` the run begins with a checkpoint of its own.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    load: Load = Load()
    world_size: int = 8
    rank: int = 0
    is_resumed: bool = False


@dataclass(frozen=True)
class Trace:
    """One step as a process of it saw it.

    Attributes:
        events: of the step, in order.
        start_bytes: most that was alive before the first step.
        resident_bytes: alive between steps: weights, gradients, optimizer, encoder.
        peak_bytes: most that was alive in the step.
        peak_at: what was made then.
        saved_bytes: what this process would write of a checkpoint behind the step.
    """

    events: list[Event]
    start_bytes: int
    resident_bytes: int
    peak_bytes: int
    peak_at: str
    saved_bytes: int


def place(file: str, line: int) -> str:
    """Returns the file and the function of a line, which stay when lines move: `model/transfer.py, read_values`.

    Args:
        file: of this repository from its root, or of a library in full.
        line: from 1.
    """
    path = ROOT / file
    nodes = ast.walk(ast.parse(path.read_text())) if path.is_file() else ()  # `<string>`, say
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    around = [node for node in functions if node.lineno <= line <= (node.end_lineno or 0)]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    return f"{file}, {innermost.name if innermost else 'no function'}"


@contextmanager
def tracing() -> Iterator[Callable[[Case], Trace]]:
    """Gives the function that traces a case in a new process, the same one for all cases.

    The function raises:
        ValueError: This machine cannot have a fake GPU.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda case: pool.submit(_trace, case).result()


def trace_all(cases: Sequence[Case]) -> list[Trace]:
    """Returns the traces of cases, in order, made one after the other in a new process.

    Raises:
        ValueError: This machine cannot have a fake GPU.
    """
    with tracing() as trace:
        return [trace(case) for case in cases]


_process: list[Any] = []  # of a process with a fake GPU: its recorder, where Transformer Engine's stand-ins report


def _trace(case: Case) -> Trace:
    """Gives this process its fake GPU if it has none yet, and traces a case. The order of the imports matters."""
    from benchmarks.fake_gpu import runtime

    if not _process:
        runtime.install()
        from benchmarks.fake_gpu import te
        from benchmarks.fake_gpu.recorder import Recorder

        _process.append(Recorder())
        _process[0].watch_synchronizing()
        te.install(_process[0])
    from benchmarks.fake_gpu.step import trace

    return trace(case, _process[0])
