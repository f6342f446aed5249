"""Runs one function over many tasks on Ray: the only file of data preparation that knows Ray.

A task carries all it needs and what it writes is there under its final name or not at all, so a task whose worker died
is simply run again.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import UsageError

if TYPE_CHECKING:  # imported where it is used: what only wants to know how shards are written does without
    import ray

MAX_RETRIES = 5  # of a task whose worker, machine or file system failed
OBJECT_STORE_BYTES_PER_WORKER = 32 << 20  # rows travel through it; images do not
MIN_OBJECT_STORE_BYTES = 128 << 20
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_TEMPORARY_BYTES = 107 - len(SOCKET)  # Source: unix(7), sun_path without its final zero


@contextmanager
def ray_session(address: str | None, workers: int | None) -> Iterator[int]:
    """Yields the number of tasks to keep in flight, connected to a cluster or to a Ray started for this block.

    Args:
        address: `auto`, `ray://host:port` or `host:port` of a cluster; None uses the Ray that this process is already
            connected to, or starts one on this machine.
        workers: Tasks at a time; None means every CPU there is.

    Raises:
        ValueError: There is no cluster at `address`, or Ray does not start here.
    """
    import ray

    started = not ray.is_initialized()
    if started and address:
        _connect(address)
    elif started:
        workers = workers or len(os.sched_getaffinity(0))
        _start(workers)
    try:
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if started:
            ray.shutdown()


def check_temporary_folder(environment: Mapping[str, str]) -> None:
    """Makes sure that the sockets which Ray makes in the temporary folder have names that Linux takes.

    Raises:
        UsageError: The folder's name is too long.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environment), None)
    if name and (num_bytes := len(os.fsencode(environment[name]))) > MAX_TEMPORARY_BYTES:
        raise UsageError(
            f"{name}={environment[name]} has {num_bytes} bytes, and Ray's sockets in it take {MAX_TEMPORARY_BYTES} at "
            "most; set RAY_TMPDIR to a folder with a short name, such as RAY_TMPDIR=/tmp (TMPDIR may stay as it is)"
        )


def _start(workers: int) -> None:
    import ray

    check_temporary_folder(os.environ)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {
        "address": "local",
        "num_cpus": workers,
        "num_gpus": 0,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": max(MIN_OBJECT_STORE_BYTES, workers * OBJECT_STORE_BYTES_PER_WORKER),
    }
    for is_last in (False, True):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray has none of its own for processes that are late, as on a very busy machine
            problem = str(error).strip().splitlines()[0]
            if is_last:
                raise ValueError(
                    f"Ray does not start on this machine, tried twice ({problem}); run again when less else runs here"
                ) from error
            print(f"Ray does not start ({problem}); trying once more", file=sys.stderr)
            ray.shutdown()


def _connect(address: str) -> None:
    """Joins a cluster, taking the packages of sharding along, so that its machines need only the dependencies."""
    import ray
    from ray.exceptions import RayError

    here = Path(__file__).resolve().parent
    packages = [str(here), str(here.with_name("common"))]
    environment = {"py_modules": packages, "excludes": ["__pycache__"]}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError) as error:
        problem = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--address {address}: no Ray cluster answers ({problem}); if it wants a token, set RAY_AUTH_MODE=token"
        ) from None


def run_tasks[Task, Result](
    function: Callable[[Task], Result], tasks: Iterable[Task], in_flight: int
) -> Iterator[Result]:
    """Yields what the function returns for each task, as they finish; takes tasks only as fast as it hands them out.

    A task is tried `1 + MAX_RETRIES` times when its worker dies or it raises OSError, on any machine that is free.

    Raises:
        ValueError, OSError: As the function raised it, or its worker died again and again.
    """
    import ray

    options: Any = {"max_retries": MAX_RETRIES, "retry_exceptions": [OSError]}
    remote = ray.remote(**options)(function)
    tasks, ready, pending = iter(tasks), [], {}
    try:
        while True:
            for task in chain(ready, islice(tasks, in_flight - len(pending) - len(ready))):
                pending[remote.remote(task)] = str(task)
            if not pending:
                return
            ready = list(islice(tasks, 1))  # made while the others run, so that no worker waits for it
            (done, *_), _ = ray.wait(list(pending))
            yield _result(done, pending.pop(done))
    finally:
        for reference in pending:
            ray.cancel(reference)


def _result[Result](reference: "ray.ObjectRef[Result]", task: str) -> Result:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # what the task raised, without Ray's traceback around it
    except RayError as error:
        problem = str(error).strip().splitlines()[0]
        raise ValueError(f"{task}: its worker died, {1 + MAX_RETRIES} times or with all of Ray ({problem})") from None
