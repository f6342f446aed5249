"""Host memory and time of saving and loading a checkpoint, against what each process owns of it.

    python -m benchmarks.checkpoint --num-layers 3
    python -m benchmarks.checkpoint --num-layers 6 --tp 2 --moments bf16 --no-background

Some layers of a 7B model with a tiny vocabulary, in bf16, divided over gloo processes, which have the optimizer's state
in host memory too. Beside it, while it saves, a process copies what is a part of a larger tensor (on a GPU: its whole
share); while it loads, it takes what of a file it reads and the weights that another reads for it. Three layers
(0.67e9 parameters) on two processes take 12 GB of memory and 10 GB of disk, six (1.3e9) twice that; with tp = 2, where
no process has all weights, and moments in bf16, 20 GB and 14 GB. Gradients are given back, as checkpoints have none;
half a training run's memory would go to them.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.shards.measure import Figure, at_most, report
from common.console import run
from model.memory import checkpoint_bytes
from pipeline.checkpoint.checkpoint import restore_checkpoint, sharded_state
from pipeline.checkpoint.run_info import describe_run, find_checkpoint
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config import RunConfig, load_config
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.optimizer import MOMENTS, build_optimizer, owned_ranges
from pipeline.state import build_stages, make_trainable

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo-stage2.yaml"
SIZES = {"hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32, "num_query_groups": 32}
SIZES |= {"head_dim": 128, "vocab_size": 512, "vision.hidden_size": 1024}
WIDE = ["compute.precision=bf16", *(f"model.{name}={size}" for name, size in SIZES.items())]


def measured(function: Callable[[], object]) -> tuple[float, int]:
    """Returns the seconds that a function took and the bytes that this process had at most beside those it had before.

    Source: proc(5): 5 in clear_refs sets the peak (VmHWM) to what is resident now.
    """
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    function()
    return time.perf_counter() - started, resident("VmHWM") - before


def resident(name: str) -> int:
    """Returns an entry of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def measure(
    rank: int, num_processes: int, port: int, overrides: list[str], moments: str, in_background: bool, folder: Path
) -> dict[str, Any]:
    """Saves and loads as one of the processes; returns what that took."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    config = load_config(CONFIG, overrides)
    device, groups = initialize_distributed(config.parallel), ProcessGroupCollection.use_mpu_process_groups()
    stages = build_stages(config, groups, [config.model.num_layers], device)
    wrapped = make_trainable(config, stages, groups)
    for buffer in cast(Any, wrapped[0]).buffers:
        buffer.grad_data.untyped_storage().resize_(0)
    optimizer, facts = build_optimizer(wrapped, config), describe_run(config, ["none"], 1)
    if moments == "bf16":
        use_bf16_moments(optimizer)
    for owned in owned_ranges(optimizer):
        for state in owned.states.values():
            state.add_(1)  # memory that nobody has written to does not count
    found: dict[str, Any] = {}
    with CheckpointWriter(folder, facts, {"config": {}}, 1, in_background=False, say=lambda line: None) as writer:
        found["saving"] = measured(lambda: writer.save(1, sharded_state(stages, optimizer, groups)))
    checkpoint = find_checkpoint(folder)
    found["written"] = sum(file.stat().st_size for file in checkpoint.glob(f"__{rank}_*"))
    found["loading"] = measured(lambda: restore_checkpoint(checkpoint, facts, stages, optimizer, groups))
    if in_background:
        with CheckpointWriter(folder, facts, {"config": {}}, 1, in_background, say=lambda line: None) as writer:
            found["waiting"] = measured(lambda: writer.save(2, sharded_state(stages, optimizer, groups)))
    shutdown_distributed()
    return found


def use_bf16_moments(optimizer: Any) -> None:
    """Gives torch's Adam the moments that Transformer Engine's would have; it could not update weights by them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            state |= {name: torch.zeros_like(state[name], dtype=torch.bfloat16) for name in MOMENTS}


def main(
    num_layers: Annotated[int, typer.Option(help="of 4,096 hidden units; a layer has 0.22e9 parameters")] = 3,
    num_processes: Annotated[int, typer.Option(help="among which the optimizer is divided")] = 2,
    tp: Annotated[int, typer.Option(help="processes among which each layer is divided")] = 1,
    background: Annotated[bool, typer.Option(help="save in the background too")] = True,
    moments: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the optimizer")] = "fp32",
    folder: Annotated[Path | None, typer.Option(help="where to write; a temporary folder if not given")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here too")] = None,
) -> None:
    """Measure how checkpoints are saved and loaded."""
    overrides = [*WIDE, f"model.num_layers={num_layers}", f"parallel.tp={tp}"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(dir=folder) as name,
        ProcessPoolExecutor(num_processes, get_context("spawn")) as processes,
    ):
        shared = num_processes, port, overrides, moments, background, Path(name)
        found = [*processes.map(measure, range(num_processes), *([each] * num_processes for each in shared))]
    heading = f"checkpoints, {num_layers} layers, {num_processes} processes, tp={tp}, moments in {moments}"
    report(heading, figures(overrides, moments, found), json_file)


def figures(overrides: list[str], moments: str, found: list[dict[str, Any]]) -> list[Figure]:
    """Returns what to report of what the processes found."""
    config: RunConfig = load_config(CONFIG, overrides)
    whole = checkpoint_bytes(config.model, config.phase, moments)
    share = whole / len(found) / 1e9
    lines = [Figure("of each process, by the formula", share, "GB")]
    for rank, each in enumerate(found):
        lines += [Figure(f"rank {rank} wrote", each["written"] / 1e9, "GB")]
        for what in ("saving", "loading"):
            seconds, beside = each[what]
            lines += [Figure(f"rank {rank}, {what}", seconds, "s")]
            lines += [at_most(f"rank {rank}, {what}: memory beside, in shares", beside / 1e9 / share, 1.0)]
        if "waiting" in each:
            lines += [Figure(f"rank {rank}, background: training waits", each["waiting"][0], "s")]
    return lines


if __name__ == "__main__":
    run(main)
