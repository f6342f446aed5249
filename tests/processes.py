"""Several processes that form one process group, started in a fraction of a second each.

They fork from a server that has imported the trainer, where torchrun would import it in every process. As with
torchrun, the one that starts them holds the store at which they meet, on a port that the kernel picks.
"""

import gc
import os
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pipeline.distributed import fork_server

TIMEOUT_SECONDS = 240
POLL_SECONDS = 0.02
GRACE_SECONDS = 5  # for the others to fail too, once one has


def run_together(num_processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what `function(*args)` returned in each of `num_processes` processes, by rank.

    Raises:
        RuntimeError: A process failed; with its traceback.
    """
    context, store = with_trainer(), new_store()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe(duplex=False)
            variables = rendezvous(store, rank, num_processes)
            process = context.Process(target=_enter, args=(theirs, variables, function, args))
            process.start()
            processes.append(process)
            theirs.close()
            pipes.append(ours)
        answers = _answers(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    silent = f"said nothing for {TIMEOUT_SECONDS} seconds, or when another had failed"
    failures = {rank: answers[pipe][0] if pipe in answers else silent for rank, pipe in enumerate(pipes)}
    if any(failures.values()):
        raise RuntimeError(
            "\n".join(f"process {rank} of {num_processes}: {why}" for rank, why in failures.items() if why)
        )
    return [answers[pipe][1] for pipe in pipes]


def with_trainer() -> ForkServerContext:
    """Returns what starts processes that have imported the trainer already."""
    return fork_server(["tests.no_gpu", "tests.world", "tests.late_imports"])


def start_server(shows_output: bool) -> None:
    """Makes the fork server a fork of this process, which need not import for seconds what this one has imported.

    For a process that has not computed yet: no thread of PyTorch's or Ray's may be in the middle of something.
    """
    resource_tracker.ensure_running()
    with patch("multiprocessing.util.spawnv_passfds", partial(_fork_and_execute, shows_output)):
        with_trainer()


def _fork_and_execute(shows_output: bool, _executable: str, arguments: list[str], descriptors: list[int]) -> int:
    """Does what `python -c code` does in a fork, which shares these files and no others; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the thread by which pytest-xdist listens: the fork wants nothing of it
        pid = os.fork()
    if pid:
        return pid
    try:
        forkserver._forkserver.__init__()  # the fork was made in the middle of starting it, which holds its lock
        # Their numbers stay taken: what pytest logs to must not become what multiprocessing opens
        nowhere, shared = os.open(os.devnull, os.O_RDWR), {*descriptors, *((1, 2) if shows_output else ())}
        for number in {int(name) for name in os.listdir("/proc/self/fd")} - shared:
            os.dup2(nowhere, number)
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def new_store() -> TCPStore:
    """Returns a store at which processes can meet, for as long as it is kept."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rendezvous(store: TCPStore, rank: int, num_processes: int) -> dict[str, str]:
    """Returns the variables by which torchrun tells a process who it is and where the others are."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _answers(pipes: list[Connection]) -> dict[Connection, tuple[str | None, Any]]:
    """Returns the failure or the value that each process tells, without those that tell nothing in time."""
    answers: dict[Connection, tuple[str | None, Any]] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while open_pipes := [pipe for pipe in pipes if pipe not in answers]:
        for pipe in (told := wait(open_pipes, max(0.0, deadline - time.monotonic()))):
            assert isinstance(pipe, Connection)
            try:
                answers[pipe] = pipe.recv()
            except EOFError:
                answers[pipe] = "died", None
            if answers[pipe][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not told:
            break
    return answers


def _enter(answer: Connection, variables: Mapping[str, str], function: Callable[..., Any], args: tuple) -> None:
    os.environ |= variables
    gc.freeze()  # what is imported stays; without this, every checkpoint looks through all of it for garbage
    try:
        answer.send((None, function(*args)))
    except BaseException:
        answer.send((traceback.format_exc(), None))


def wait_for_steps(run: subprocess.Popen[bytes], run_dir: Path, number: int, said: Path) -> None:
    """Returns once a training run that was started as a command has finished so many steps.

    Raises:
        AssertionError: It ended before, or is too slow; with what it said, which stands in a file.
    """
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + TIMEOUT_SECONDS
    while not metrics.is_file() or metrics.read_text().count("\n") < number:
        with suppress(subprocess.TimeoutExpired):
            run.wait(POLL_SECONDS)
        assert run.poll() is None and time.monotonic() < deadline, said.read_text()
