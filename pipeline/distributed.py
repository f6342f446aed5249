"""Starts this process's part of a run: process group, device, megatron-core's groups.

Under torchrun (or Ray) the environment says who this process is; without it, the process is a run of one.
"""

import hashlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from common.console import TOLD_ELSEWHERE, UsageError
from model.cpu_backend import use_cpu_as_cuda
from model.parallel import ParallelConfig

TIMEOUT_MINUTES = 30  # loading a base folder or compiling kernels on one rank must not kill the others
STORE_TIMEOUT = timedelta(seconds=10)
LOST = (
    "the connection to another process of this run is lost; what that one says last, or the kernel of its machine "
    "(out of memory?), tells why; the same command goes on from the last checkpoint"
)


def initialize_distributed(parallel: ParallelConfig | None = None) -> torch.device:
    """Joins the process group and returns this process's device. Uses NCCL on GPUs and gloo on CPUs.

    Raises:
        UsageError: The processes cannot be divided as `parallel` asks.
    """
    parallel = parallel or ParallelConfig()
    use_cpu_as_cuda()
    set_gpu_environment(parallel)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it lists every bucket and configuration at INFO
    on_gpu = torch.cuda.is_available()
    # Ray has formed the group and chosen the device of each worker before it calls us; torchrun leaves both to us.
    if not torch.distributed.is_initialized():
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=TIMEOUT_MINUTES)
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend, timeout=timeout)
        else:
            store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            torch.distributed.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
    check_world_size(parallel, torch.distributed.get_world_size())
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.chunks_per_rank if parallel.chunks_per_rank > 1 else None,
        )
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def set_gpu_environment(parallel: ParallelConfig) -> None:
    """Sets what CUDA and torch read when they first ask for a GPU, unless the user has; the first process says so."""
    settings = gpu_environment(parallel, os.environ)
    if not torch.cuda.is_available() or torch.cuda.is_initialized() or not settings:
        return
    os.environ.update(settings)
    if os.environ.get("RANK", "0") == "0":
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        print(f"environment: {told}; set them yourself for anything else", flush=True)


def gpu_environment(parallel: ParallelConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to set for GPUs.

    Segments that grow lose less memory between packs of unequal size. Where layers are divided, megatron-core counts on
    one queue: a collective that it starts before a product then also begins before it.
    """
    settings = {}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():  # the newer name, and the older
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if parallel.tp > 1 and "CUDA_DEVICE_MAX_CONNECTIONS" not in environment:
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return settings


def check_world_size(parallel: ParallelConfig, num_processes: int) -> None:
    """Makes sure that replicas of the model fill the processes.

    Raises:
        UsageError: They do not.
    """
    replica = parallel.tp * parallel.pp
    if num_processes % replica:
        raise UsageError(
            f"parallel.tp={parallel.tp} times parallel.pp={parallel.pp} must divide the number of processes, "
            f"{num_processes}; start a multiple of {replica}, or lower them"
        )


def broadcast_from_rank0[Value](compute: Callable[[], Value]) -> Value:
    """Returns on every rank what the first rank computes; the others wait.

    Raises:
        ValueError, OSError, RuntimeError: On every rank, if the first raises any error.
    """
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:
            failure, box[1] = error, _sendable(error)
    torch.distributed.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise box[1]
    return box[0]


def _sendable(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    kind = next((kind for kind in (UsageError, ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    return kind(str(error))


@contextmanager
def told_once() -> Iterator[None]:
    """Lets only one process of a run under torchrun print an error that several have, and makes one of a lost peer.

    Raises:
        OSError: The connection to another process is lost.
    """
    try:
        try:
            yield
        except RuntimeError as error:
            if "gloo/transport" not in str(error) and not isinstance(error, torch.distributed.DistNetworkError):
                raise
            raise OSError(LOST) from error
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        if not _is_first_to_tell(str(error)):
            error.add_note(TOLD_ELSEWHERE)
        raise


def _is_first_to_tell(line: str) -> bool:
    """Whether no other process has asked this of the same line; they need not be able to talk to each other."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's own store, which outlives its processes
        return True
    key = f"told {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {hashlib.sha256(line.encode()).hexdigest()}"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return store.add(key, 1) == 1
    except RuntimeError:
        return True


def worker_context() -> ForkServerContext:
    """Returns how to start processes that read and encode.

    A fork of a trainer would inherit the locks of its threads and its CUDA context; these fork from a clean server that
    has imported what they need.
    """
    return fork_server(["pipeline.data.batches", "pipeline.shards.shard_set", "torchvision.io"])


def fork_server(modules: list[str]) -> ForkServerContext:
    """Returns how to start processes that have imported `modules` already; SIGTERM is blocked in them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # or starting the server would do it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def init_worker_signals(worker: int = 0) -> None:
    """Lets a process of the fork server end with the trainer, or by its SIGTERM, and by nobody else's.

    To stop a run, the signal is sent to its whole process group; then the trainer needs what it has asked its workers
    for, to end the step and save.
    """
    trainer = parent_process()
    assert trainer is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_signal() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
            pass
        os._exit(0)

    def wait_for_end() -> None:
        trainer.join()
        os._exit(1)

    for wait in (wait_for_signal, wait_for_end):
        threading.Thread(target=wait, daemon=True).start()


def shutdown_distributed() -> None:
    """Leaves the process group, so that the next run in this process starts afresh."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
