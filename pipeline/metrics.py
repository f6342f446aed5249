"""What a run tells: a progress bar or plain lines, `metrics.jsonl` with every step, TensorBoard, Weights & Biases.

The first process only. Model FLOPs are SAISA's own and the encoder's, each counted once, forward and backward; MFU is
their rate over what the chip's tensor cores do in bf16, also under FP8.
"""

import importlib
import json
import resource
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

from common.console import UsageError, build_console, build_progress
from common.files import named_errors, write_whole
from pipeline.config import LogConfig
from pipeline.data.schedule import BatchCounts

TELL_SLOWEST = 0.2  # above the mean of all processes
NESTED = ("counts", "phase_seconds")
TENSORBOARD_THREAD = "tensorboard.summary.writer.event_file_writer"  # the module of the thread that writes its files


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over a global batch. `step` counts finished steps; rates include the wait for data.

    `peak_memory_bytes` is the most this process had so far: of the GPU, or of the machine where there is none;
    `reserved_memory_bytes` what torch held of the GPU for it. `phase_seconds` are those of this step up to its wait for
    the GPU (data, encode, forward_backward with reduce in it); what comes behind it (optimizer, save) is of the step
    before. `slowest_rank` took the most time in the step before until it waited for others, `slowest_fraction` more
    than the mean.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    step_seconds: float
    data_wait_fraction: float
    counts: BatchCounts
    flops: int
    num_processes: int
    peak_memory_bytes: int
    reserved_memory_bytes: int = 0
    slowest_rank: int = 0
    slowest_fraction: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        """Samples of the global batch over the time of the step."""
        return self.counts.num_samples / self.step_seconds

    @property
    def tflops_per_second(self) -> float:
        """10^12 model FLOPs a second, of each process."""
        return self.flops / self.step_seconds / self.num_processes / 1e12

    def values(self, peak_tflops: float | None = None) -> dict[str, float]:
        """Returns every number by name, as a line of `metrics.jsonl` has it; `mfu` if the chip's peak is known."""
        own = {part.name: getattr(self, part.name) for part in fields(self) if part.name not in NESTED}
        num_rows = self.counts.num_text_tokens + self.counts.num_padding_tokens
        rates = {
            "samples_per_second": self.samples_per_second,
            "text_tokens_per_second": self.counts.num_text_tokens / self.step_seconds,
            "visual_tokens_per_second": self.counts.num_visual_tokens / self.step_seconds,
            "tflops_per_second": self.tflops_per_second,
            "padding_fraction": self.counts.num_padding_tokens / num_rows,
        }
        mfu = {} if peak_tflops is None else {"mfu": self.tflops_per_second / peak_tflops}
        phases = {f"{name}_seconds": seconds for name, seconds in self.phase_seconds.items()}
        return own | asdict(self.counts) | rates | mfu | phases


# bf16 on the tensor cores without sparsity, in 10^12 FLOPs a second. Source: NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "B200": 2250, "A100": 312, "L40S": 362}


def peak_tflops(config: LogConfig) -> float | None:
    """Returns the peak of this process's chip, as configured or as its name tells; None if neither says."""
    if config.peak_tflops is not None or not torch.cuda.is_available():
        return config.peak_tflops
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def peak_memory() -> int:
    """Returns the most bytes this process has had so far, on its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def reserved_memory() -> int:
    """Returns the most bytes that torch has held of this process's GPU so far; 0 without one."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def check_log(config: LogConfig) -> None:
    """Makes sure that a run can report as configured.

    Raises:
        UsageError: A package that it needs is not installed.
    """
    if config.wandb_project is not None and find_spec("wandb") is None:
        raise UsageError(
            f"log.wandb_project={config.wandb_project} needs the package wandb; install it, or leave the setting out"
        )


class MetricsLog:
    """Where the metrics of a run go; a context manager, silent on every rank but the first.

    What cannot be written is kept as `failure`, since the other processes are in the middle of a step: the loop stops
    all of them at its end, and `check` raises it.
    """

    def __init__(self, run_dir: Path, config: LogConfig, first_step: int, num_steps: int, is_first_rank: bool) -> None:
        self.config, self.run_dir, self.silent = config, run_dir, not is_first_rank
        self.first_step, self.num_steps = first_step, num_steps
        self.failure: OSError | None = None
        self.console = build_console()
        columns = ["step", MofNCompleteColumn(), BarColumn(), "{task.description}"]
        columns += [TimeElapsedColumn(), "left", TimeRemainingColumn()]
        self.progress = build_progress(self.console, *columns, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=num_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self.silent:
            return self
        run_dir, config = self.run_dir, self.config
        with named_errors(run_dir / "metrics.jsonl"):
            _drop_from(run_dir / "metrics.jsonl", self.first_step)
            self.file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        with named_errors(run_dir / "tensorboard"):
            self.tensorboard = start_tensorboard(run_dir, self.first_step) if config.tensorboard else None
        self.excepthook, threading.excepthook = threading.excepthook, self._in_thread
        self.wandb = start_wandb(config.wandb_project, run_dir) if config.wandb_project else None
        self.peak_tflops = peak_tflops(config)
        self.started = time.monotonic()
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.silent:
            return
        self.progress.stop()
        with self._failures("metrics.jsonl"):
            self.file.close()
        if self.tensorboard:
            with self._failures("tensorboard"):
                self.tensorboard.close()
        threading.excepthook = self.excepthook
        if self.wandb:
            self.wandb.finish()

    def check(self) -> None:
        """Raises what could not be written, if anything."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        try:
            with named_errors(self.run_dir / name):
                yield
        except OSError as error:
            self.failure = self.failure or error

    def _in_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Keeps what TensorBoard's thread could not write, of which Python would print the traceback."""
        if isinstance(failed.exc_value, OSError) and type(failed.thread).__module__ == TENSORBOARD_THREAD:
            with self._failures("tensorboard"):
                raise failed.exc_value
        else:
            self.excepthook(failed)

    def step(self, metrics: StepMetrics) -> None:
        """Records one finished step."""
        if self.silent:
            return
        values = metrics.values(self.peak_tflops)
        with self._failures("metrics.jsonl"):  # what it could not write it tries again with the next
            self.file.write(json.dumps(values) + "\n")
        if self.tensorboard:
            with self._failures("tensorboard"):
                for name, value in values.items():
                    if name != "step":
                        self.tensorboard.add_scalar(name, value, metrics.step)
        if self.wandb:
            self.wandb.log(values, step=metrics.step)
        told = f"loss {metrics.loss:.4f}  {metrics.samples_per_second:.1f} samples/s"
        self.progress.update(self.task, completed=metrics.step, description=told)
        due = metrics.step % self.config.every_steps == 0 or metrics.step == self.num_steps
        if due and self.progress.disable:
            per_step = (time.monotonic() - self.started) / (metrics.step - self.first_step)
            left = timedelta(seconds=round(per_step * (self.num_steps - metrics.step)))
            rate = f"lr {metrics.learning_rate:.2e}  grad norm {metrics.grad_norm:.2f}"
            if "mfu" in values:
                rate += f"  {metrics.tflops_per_second:.0f} TFLOP/s  MFU {values['mfu']:.1%}"
            if metrics.slowest_fraction > TELL_SLOWEST:
                rate += f"  rank {metrics.slowest_rank} is {metrics.slowest_fraction:.0%} slower than the mean"
            self.say(f"step {metrics.step}/{self.num_steps}  {told}  {rate}  left {left}")

    def say(self, line: str) -> None:
        """Prints one line, above the progress bar if there is one."""
        if not self.silent:
            self.console.print(line)


def start_tensorboard(run_dir: Path, first_step: int) -> Any:
    """Returns a writer for the folder of a run; what it has of later steps is not shown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)


def start_wandb(project: str, run_dir: Path) -> Any:
    """Returns a run of Weights & Biases that goes on where an earlier one of the same folder ended.

    It keeps the first value of a step that a killed run takes again.
    """
    wandb = importlib.import_module("wandb")
    kept = run_dir / "wandb-id"
    if not kept.is_file():
        write_whole(kept, uuid.uuid4().hex[:12].encode())
    return wandb.init(project=project, name=run_dir.name, id=kept.read_text(), dir=run_dir, resume="allow")


def read_metrics(run_dir: Path) -> list[dict]:
    """Returns the recorded steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _drop_from(file: Path, step: int) -> None:
    """Cuts the lines after `step` that an interrupted run wrote beyond its last checkpoint, and any torn one."""
    if file.is_file():
        whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
        try:
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); mend its lines or move it away, then start again") from None
        write_whole(file, "".join(f"{line}\n" for line in kept).encode())
