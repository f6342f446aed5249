"""What a run tells: a progress bar or plain lines, `metrics.jsonl` with every step, TensorBoard. Rank 0 only."""

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from data_prep.files import write_whole
from pipeline.config import LogConfig
from pipeline.schedule import BatchCounts


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over a global batch. `step` counts finished steps; rates include the wait for data."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    step_seconds: float
    data_wait_fraction: float
    counts: BatchCounts

    @property
    def samples_per_second(self) -> float:
        """Samples of the global batch over the time of the step."""
        return self.counts.num_samples / self.step_seconds

    def values(self) -> dict[str, float]:
        """Returns every number by name, as a line of `metrics.jsonl` has it."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "counts"}
        rates = {
            "samples_per_second": self.samples_per_second,
            "text_tokens_per_second": self.counts.num_text_tokens / self.step_seconds,
            "visual_tokens_per_second": self.counts.num_visual_tokens / self.step_seconds,
        }
        return own | asdict(self.counts) | rates


class MetricsLog:
    """Where the metrics of a run go; a context manager, silent on every rank but the first."""

    def __init__(self, run_dir: Path, config: LogConfig, first_step: int, num_steps: int, is_first_rank: bool) -> None:
        self.config, self.num_steps, self.silent = config, num_steps, not is_first_rank
        if self.silent:
            return
        self.console = Console()
        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=num_steps, completed=first_step)
        _drop_from(run_dir / "metrics.jsonl", first_step)
        self.file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self.tensorboard = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1) if config.tensorboard else None
        )
        self.started, self.first_step = time.monotonic(), first_step

    def __enter__(self) -> Self:
        if not self.silent:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.silent:
            return
        self.progress.stop()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def step(self, metrics: StepMetrics) -> None:
        """Records one finished step."""
        if self.silent:
            return
        values = metrics.values()
        self.file.write(json.dumps(values) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, metrics.step)
        told = f"loss {metrics.loss:.4f}  {metrics.samples_per_second:.1f} samples/s"
        self.progress.update(self.task, completed=metrics.step, description=told)
        due = metrics.step % self.config.every_steps == 0 or metrics.step == self.num_steps
        if due and self.progress.disable:
            per_step = (time.monotonic() - self.started) / (metrics.step - self.first_step)
            left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.num_steps - metrics.step)))
            rate = f"lr {metrics.learning_rate:.2e}  grad norm {metrics.grad_norm:.2f}"
            self.say(f"step {metrics.step}/{self.num_steps}  {told}  {rate}  left {left}")

    def say(self, line: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        if not self.silent:
            self.console.print(line, highlight=False, soft_wrap=True)


def read_metrics(run_dir: Path) -> list[dict]:
    """Returns the recorded steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _drop_from(file: Path, step: int) -> None:
    """Cuts the lines after `step` that an interrupted run wrote beyond its last checkpoint, and any torn one."""
    if file.is_file():
        whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_whole(file, "".join(f"{line}\n" for line in kept).encode())
