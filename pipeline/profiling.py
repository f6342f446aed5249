"""A trace of a few steps, one file a process: `log.profile_steps=[20,23]` writes to the run folder's `profile`.

rank-0-steps-20-23.json.gz      for https://ui.perfetto.dev or chrome://tracing
rank-0-steps-20-23.pickle       on GPUs: every allocation in those steps, for https://pytorch.org/memory_viz

The recorded steps are slower than others.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MAX_MEMORY_EVENTS = 1_000_000


class Profiler:
    """Records the steps from `first` to `last`; does nothing without them."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, rank: int, on_gpu: bool) -> None:
        self.steps, self.on_gpu = steps, on_gpu
        first, last = steps or (0, 0)
        self.stem = folder / f"rank-{rank}-steps-{first}-{last}"
        self.running: profile | None = None

    def before(self, step: int) -> None:
        """Starts, if `step` is the first to be recorded; steps count from 1, as in `metrics.jsonl`."""
        if self.steps is None or step != self.steps[0]:
            return
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.running = profile(activities=activities, record_shapes=True)
        self.running.__enter__()

    def after(self, step: int, is_last: bool) -> list[Path]:
        """Returns the files it has written: none, unless `step` is the last to be recorded, or of the run."""
        if self.running is None or self.steps is None or not (step >= self.steps[1] or is_last):
            return []
        running, self.running = self.running, None
        running.__exit__(None, None, None)
        files = [self.stem.with_suffix(".json.gz")]
        running.export_chrome_trace(str(files[0]))
        if self.on_gpu:
            files.append(self.stem.with_suffix(".pickle"))
            torch.cuda.memory._dump_snapshot(str(files[-1]))
            torch.cuda.memory._record_memory_history(enabled=None)
        return files
