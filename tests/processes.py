"""Several processes that form one process group, started in a fraction of a second each.

They fork from a server that has imported the trainer, where torchrun would import it in every process.
"""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

TIMEOUT_SECONDS = 240


def run_together(num_processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what `function(*args)` returned in each of `num_processes` processes, by rank.

    Raises:
        RuntimeError: A process failed; with its traceback.
    """
    context, port, running = fork_server(), free_port(), []
    for rank in range(num_processes):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(theirs, rank, num_processes, port, function, args), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    answers = [_answer(ours) for _, ours in running]  # all of them: one that failed takes the others along
    for process, _ in running:
        process.kill()
        process.join()
    if failures := [f"process {rank} of {num_processes}: {why}" for rank, (why, _) in enumerate(answers) if why]:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in answers]


def fork_server() -> ForkServerContext:
    """Returns what starts processes that have imported the trainer already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.train", "tests.world"])
    return context


def _answer(pipe: Connection) -> tuple[str | None, Any]:
    if not pipe.poll(TIMEOUT_SECONDS):
        return f"said nothing for {TIMEOUT_SECONDS} seconds", None
    try:
        return pipe.recv()
    except EOFError:
        return "died", None


def _enter(
    answer: Connection, rank: int, num_processes: int, port: int, function: Callable[..., Any], args: tuple
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        answer.send((None, function(*args)))
    except BaseException:
        answer.send((traceback.format_exc(), None))


def free_port() -> int:
    """Returns a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
