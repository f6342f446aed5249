"""Starts this process's part of a run: process group, device, megatron-core's groups.

Under torchrun (or Ray) the environment says who this process is; without it, the process is a run of one.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch
from megatron.core import parallel_state

from model.cpu_backend import use_cpu_as_cuda
from model.parallel import ParallelConfig

TIMEOUT_MINUTES = 30  # loading a base folder or compiling kernels on one rank must not kill the others


def initialize_distributed(parallel: ParallelConfig | None = None) -> torch.device:
    """Joins the process group and returns this process's device. Uses NCCL on GPUs and gloo on CPUs.

    Raises:
        ValueError: The processes cannot be divided as `parallel` asks.
    """
    parallel = parallel or ParallelConfig()
    use_cpu_as_cuda()
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


def check_world_size(parallel: ParallelConfig, num_processes: int) -> None:
    """Makes sure that replicas of the model fill the processes.

    Raises:
        ValueError: They do not.
    """
    replica = parallel.tp * parallel.pp
    if num_processes % replica:
        raise ValueError(
            f"parallel.tp={parallel.tp} times parallel.pp={parallel.pp} must divide the number of processes, "
            f"{num_processes}; start a multiple of {replica}, or lower them"
        )


def computed_once[Value](compute: Callable[[], Value]) -> Value:
    """Returns on every rank what the first rank computes; the others wait.

    Raises:
        ValueError: On every rank, if the first raises it.
    """
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = compute()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def worker_context() -> BaseContext:
    """Returns how to start processes that read and encode.

    A fork of a trainer would inherit the locks of its threads and its CUDA context; these fork from a clean server that
    has imported what they need.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data"])
    return context


def shutdown_distributed() -> None:
    """Leaves the process group, so that the next run in this process starts afresh."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
