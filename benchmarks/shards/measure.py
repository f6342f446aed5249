"""How the sharding benchmarks time, weigh and report: ratios within one run, because machines are noisy."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil
from rich.table import Table

from common.console import build_console


@dataclass(frozen=True)
class Figure:
    """One measured number; `target` is what was asked of it, with `met` telling whether it is reached."""

    what: str
    value: float
    unit: str = ""
    target: str = ""
    met: bool | None = None


def at_least(what: str, value: float, target: float) -> Figure:
    """Returns a ratio that should not be below its target."""
    return Figure(what, value, "", f"at least {target:g}", value >= target)


def at_most(what: str, value: float, target: float, unit: str = "") -> Figure:
    """Returns a number that should not be above its target."""
    return Figure(what, value, unit, f"at most {target:g}", value <= target)


def time_rounds(
    runs: Mapping[str, Callable[[Path], object]], inputs: Sequence[Path], folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds that each run took in each round; every run writes to a new folder it is given.

    The order turns around with each round. Before a run starts the `inputs` are in the page cache, and the dirty pages
    of the run before are on the disk. An untimed round comes first, in which Ray's workers import what they need.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            out = folder / name
            shutil.rmtree(out, ignore_errors=True)
            for path in inputs:
                path.read_bytes()
            os.sync()
            started = time.perf_counter()
            runs[name](out)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def median_ratio(over: list[float], under: list[float]) -> float:
    """Returns the median of the ratios of each round, in which both met the same machine."""
    return median(a / b for a, b in zip(over, under, strict=True))


def run_fresh[**P, Result](function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Returns what the function returns in a process of its own, so that its peak memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args, **kwargs).result()


def peak_bytes(pid: int | None = None) -> int:
    """Returns the largest resident memory a process has had (Linux).

    Unlike `ru_maxrss` it does not begin with that of the process which started this one.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def worker_peak_bytes() -> int:
    """Returns the largest resident memory any Ray worker of this process has had."""
    processes = psutil.Process().children(recursive=True)
    return max(peak_bytes(process.pid) for process in processes if process.name().startswith("ray::"))


def report(
    title: str, figures: list[Figure], json_file: Path | None = None, machine: dict[str, str] | None = None
) -> None:
    """Prints the figures, and writes them with what they were measured on; `machine` says more about that."""
    table = Table("what", "measured", "target", title=title)
    for figure in figures:
        verdict = "" if figure.met is None else ": met" if figure.met else ": MISSED"
        value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
        table.add_row(figure.what, f"{value} {figure.unit}", figure.target + verdict)
    build_console().print(table)
    if machine:
        build_console().print("measured on", ", ".join(f"{name} {version}" for name, version in machine.items()))
    if json_file:
        versions = {name: metadata.version(name) for name in ("ray", "pillow", "numpy")} | (machine or {})
        measured_on = {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}
        numbers = {"title": title, "machine": measured_on, "figures": [vars(figure) for figure in figures]}
        json_file.write_text(json.dumps(numbers, indent=1) + "\n")
