"""A trace of a few steps, one file a process: `log.profile_steps=[20,23]` writes to the run folder's `profile`.

rank-0-steps-20-23.json.gz      for https://ui.perfetto.dev or chrome://tracing
rank-0-steps-20-23.pickle       on GPUs: every allocation in those steps, for https://pytorch.org/memory_viz

The recorded steps are slower than others. A file that cannot be written costs the run nothing: a line says so.
"""

import errno
import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common.console import describe
from common.files import named_errors, write_whole

MAX_MEMORY_EVENTS = 1_000_000


def check_profile_steps(steps: tuple[int, int] | None, num_steps: int) -> None:
    """Makes sure that a run of `num_steps` steps has what is to be recorded.

    Raises:
        ValueError: It ends before.
    """
    if steps is not None and steps[0] > num_steps:
        raise ValueError(
            f"log.profile_steps={list(steps)} begins behind the last step of this run, {num_steps}; use "
            f"[{max(1, num_steps - 1)},{num_steps}] or earlier ones, or leave it out"
        )


class Profiler:
    """Records the steps from `first` to `last`, or those of them that a run has; does nothing without them."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, rank: int, on_gpu: bool) -> None:
        self.folder, self.rank, self.on_gpu = folder, rank, on_gpu
        self.first, self.last = steps or (0, -1)
        self.running: profile | None = None
        self.recorded: tuple[profile, int] | None = None  # and the last step in it

    def before(self, step: int) -> None:
        """Starts, if `step` is the first to be recorded; steps count from 1, as in `metrics.jsonl`."""
        if self.running is not None or not self.first <= step <= self.last:
            return
        self.first = step  # a run may go on from a checkpoint in their midst
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it calls a missing GPU an error
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.running = profile(activities=activities, record_shapes=True)
        self.running.__enter__()

    def after(self, step: int, is_last: bool) -> None:
        """Stops, if `step` is the last to be recorded, or of the run."""
        if self.running is not None and (step >= self.last or is_last):
            self.running.__exit__(None, None, None)
            self.running, self.recorded = None, (self.running, step)

    def write(self) -> list[Path]:
        """Returns the files it has written: none, unless something was recorded since the last time."""
        if self.recorded is None:
            return []
        (recorded, step), self.recorded = self.recorded, None
        stem = self.folder / f"rank-{self.rank}-steps-{self.first}-{step}"
        written = self._write(stem.with_suffix(".json.gz"), lambda file: write_trace(recorded, file))
        if self.on_gpu:
            written += self._write(stem.with_suffix(".pickle"), write_allocations)
            torch.cuda.memory._record_memory_history(enabled=None)
        return written

    def _write(self, file: Path, write: Callable[[Path], None]) -> list[Path]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(file)
        except OSError as error:
            print(f"rank {self.rank}: no profile, training goes on: {describe(error)}", file=sys.stderr, flush=True)
            return []
        return [file]


def write_trace(recorded: profile, file: Path) -> None:
    """Writes a trace; torch's own way is to leave out, without a word, what finds no room."""
    plain = file.with_suffix("")
    try:
        recorded.export_chrome_trace(str(plain))
        trace = plain.read_bytes() if plain.is_file() else b""
        if not trace.endswith(b"}"):
            raise OSError(errno.EIO, "torch could not write all of it; is there room?", str(plain))
        write_whole(file, gzip.compress(trace))
    finally:
        plain.unlink(missing_ok=True)


def write_allocations(file: Path) -> None:
    """Writes every allocation since the recording began."""
    part = file.with_suffix(".part")
    try:
        with named_errors(file):
            torch.cuda.memory._dump_snapshot(str(part))
            part.rename(file)
    finally:
        part.unlink(missing_ok=True)
