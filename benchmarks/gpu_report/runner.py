"""Which parts the report has, in which order, and the process of its own that each runs in.

What matters most comes first. A part has a limit, and writes each row as soon as it has it; the report is written anew
after each part. So a run that is cut, or a part that crashes, loses nothing else. Nothing here imports torch.
"""

import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.tables import Result, write_report
from common.version import code_version

TOTAL_SECONDS = 540
MAX_SAID = 300  # characters


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        name: of its function in `benchmarks.gpu_report.parts`, and of the file with its rows.
        what: its heading.
        arguments: of the function.
        limit_seconds: after which it is killed.
        hides_gpu: whether it must compute on the CPU.
    """

    name: str
    what: str
    arguments: tuple[Any, ...] = ()
    limit_seconds: float = 60
    hides_gpu: bool = False

    @property
    def file(self) -> str:
        """The name of the file with its rows, other parts' unlike."""
        return "-".join([self.name, *map(str, self.arguments)]) + ".jsonl"

    @property
    def log(self) -> str:
        """The name of the file with what its process said."""
        return self.file.replace(".jsonl", ".log")


PARTS = [
    Part("machine", "Machine", limit_seconds=40),
    Part("kernels", "Attention kernels against dense masks (tests/gpu)", ("test_attention.py",), 100),
    Part("kernels", "Transformer Engine's layers and FP8 against references (tests/gpu)", ("test_layers.py",), 130),
    Part("losses", "Losses of four steps at small width, fp32 on the CPU", ("cpu",), 60, hides_gpu=True),
    Part("losses", "Losses of four steps at small width, against the CPU's", ("gpu",), 80),
    Part("step", "A step of stage 2 in bf16, 7B widths", ("stage2", "bf16"), 60),
    Part("step", "A step of stage 2 in FP8, 7B widths", ("stage2", "fp8"), 60),
    Part("step", "A step of stage 1 in bf16, 7B widths", ("stage1", "bf16"), 60),
    Part("llava", "A layer of SAISA and one like LLaVA's, 7B widths", limit_seconds=50),
    Part("backends", "Attention backends, FP8 recipes and norms, 7B widths", limit_seconds=70),
    Part("prefill", "Prefill of an export and of transformers' LLaVA, 4 layers of 7B widths", limit_seconds=60),
]


def run_part(part: Part, folder: Path, is_dry: bool, limit_seconds: float) -> Result:
    """Returns what a part found, in a process of its own that is killed when its time is over."""
    started, file, log = time.monotonic(), folder / part.file, folder / part.log
    process = starter(is_dry).Process(target=enter_part, args=(part, folder, is_dry))
    process.start()
    process.join(limit_seconds)
    status = "done" if process.exitcode == 0 else f"failed: exit status {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
        status = f"cut after {limit_seconds:.0f} s"
    if status != "done":
        status += last_said(log)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return Result(part.what, status, time.monotonic() - started, rows)


def last_said(log: Path) -> str:
    """Returns the last line that a part said, as an addition to how it ended; nothing if it was silent."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"; it last said: {said[-1][:MAX_SAID]}" if said else ""


def starter(is_dry: bool) -> Any:
    """Returns how processes start: anew, since a fork of one that has asked for GPUs could not use them.

    Where none is used they fork from one that has imported all.
    """
    if not is_dry:
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_report.no_gpu", "benchmarks.gpu_report.parts"])
    return context


def enter_part(part: Part, folder: Path, is_dry: bool) -> None:
    """Runs a part in this process; each row it records is on the disk at once, and what is said."""
    with (folder / part.log).open("wb") as log:
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    if part.hides_gpu or is_dry:
        import_module("benchmarks.gpu_report.no_gpu")
    parts = import_module("benchmarks.gpu_report.parts")  # and torch: not before the GPUs are hidden

    with (folder / part.file).open("w", buffering=1) as file:

        def record(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")

        getattr(parts, part.name)(parts.Work(folder, is_dry, record), *part.arguments)


def make_report(parts: list[Part], out: Path, folder: Path, is_dry: bool) -> list[Result]:
    """Returns the results of the parts, after writing the report to `out` as it grew."""
    deadline, results = time.monotonic() + TOTAL_SECONDS, []
    about = {"commit": code_version()["saisa"], "date": datetime.now(UTC).isoformat(timespec="minutes")}
    for part in parts:
        limit = min(part.limit_seconds, deadline - time.monotonic())
        if limit < 1:
            results.append(Result(part.what, f"left out: {TOTAL_SECONDS} s were over", 0.0, []))
        else:
            results.append(run_part(part, folder, is_dry, limit))
        print(f"{part.what}: {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        write_report(out, about | {"dry run": is_dry}, results)
    return results
