"""Writes training checkpoints: whole or not there.

A checkpoint is written into a `.part` folder and renamed when every process is done, so that whatever bears its final
name can be resumed from.
"""

import ctypes
import json
import os
import pickle
import queue
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from common.files import sync_folder, write_whole
from pipeline.checkpoint.checkpoint import first_cause
from pipeline.checkpoint.integrity import own_digests, write_manifest
from pipeline.checkpoint.run_info import RunInfo
from pipeline.distributed import broadcast_from_rank0

FILES_PER_PROCESS = 4  # each has a thread that writes it and one that hashes it
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; a context manager that ends when the last is whole.

    In the background, training goes on as soon as the state is copied; a process forked from each writes and hashes its
    part, and `poll`, called by all after every step, gives the checkpoint its name once every part is there.
    """

    def __init__(
        self,
        run_dir: Path,
        run: RunInfo,
        extra_info: dict[str, Any],
        keep_last: int,
        in_background: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.run, self.extra_info = run_dir / "checkpoints", run, extra_info
        self.keep_last, self.in_background, self.say = keep_last, in_background, say
        self.calls = AsyncCallsQueue()

    def __enter__(self) -> Self:
        broadcast_from_rank0(self._remove_old)  # a kill may have come before
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.poll(wait=True)
            return
        for call in self.calls.async_calls:
            call.async_caller.close(abort=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state (from `sharded_state`) after `step` optimizer steps.

        Raises:
            OSError: It could not be written.
        """
        self.poll(wait=True)
        part = self.folder / f"step-{step:08d}.part"
        filesystem_async._results_queue, digests = _ResultFile(), _ResultFile()
        with self._named_errors():
            broadcast_from_rank0(lambda: part.mkdir(parents=True))
            strategy = TorchDistSaveShardedStrategy(thread_count=FILES_PER_PROCESS)
            request: Any = dist_checkpointing.save(
                state, str(part), sharded_strategy=strategy, async_sharded_save=True, async_strategy="mcore"
            )
        if request.async_fn is None:  # this process has nothing to write
            digests.put({})
        else:
            write = partial(_write_part, request.async_fn, part, torch.distributed.get_rank(), digests)
            request = request._replace(async_fn=partial(_as_child, os.getpid(), write) if self.in_background else write)
        request.add_finalize_fn(lambda: self._publish(step, part, digests))
        if self.in_background:
            self.calls.schedule_async_request(request)
            return
        with self._named_errors():
            request.execute_sync()

    def poll(self, wait: bool = False) -> None:
        """Publishes a checkpoint that is written on every process.

        Raises:
            OSError: It could not be written.
        """
        if not self.calls.get_num_unfinalized_calls():
            return
        with self._named_errors():
            self.calls.maybe_finalize_async_calls(blocking=wait)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            raise OSError(
                f"{self.folder}: a checkpoint could not be written; the one before it is whole: {first_cause(error)}"
            ) from error

    def _publish(self, step: int, part: Path, digests: "_ResultFile") -> None:
        """Gives a written checkpoint its name; all processes call it.

        Raises:
            OSError: On all of them: one could not write, hash or name its part.
        """
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        try:
            torch.distributed.all_gather_object(parts, digests.get_nowait())
        except queue.Empty:
            torch.distributed.all_gather_object(parts, "a process ended before it had hashed what it wrote")
        folder = broadcast_from_rank0(lambda: self._name(step, part, parts))
        self.say(f"saved {folder}")

    def _name(self, step: int, part: Path, parts: list[dict[str, str] | str]) -> Path:
        digests: dict[str, str] = {}
        for found in parts:
            if isinstance(found, str):
                raise OSError(found)
            digests |= found
        info = {"step": step, "run": asdict(self.run), **self.extra_info}
        write_whole(part / "info.json", json.dumps(info, indent=1).encode())
        write_manifest(part, digests)
        folder = part.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync_folder(folder.parent)
        self._remove_old()
        return folder

    def _remove_old(self) -> None:
        """Removes all but the last checkpoints, none of them by halves under its final name, and unfinished ones."""
        for part in self.folder.glob("*.part"):
            self._remove(part)
        for old in sorted(self.folder.glob("step-????????"))[: -self.keep_last]:
            self._remove(old.rename(old.with_suffix(".part")))

    def _remove(self, folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # on NFS while another reads it, say
            self.say(f"{folder} could not be removed; the next save tries again ({error})")


class _ResultFile:
    """What a forked process tells the one it was forked from, which reads it once the other has ended.

    A file without a name, since nobody reads a pipe before, and it holds 64 KiB: the results of some 450 tensors.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it is read after the process that writes it has ended)

    def put(self, content: Any) -> None:
        pickle.dump(content, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


def _write_part(write: Callable[..., None], part: Path, rank: int, digests: _ResultFile, *args: Any) -> None:
    """Writes and hashes this process's files; a failure goes where the results go, and so to all processes."""
    results = args[-1]
    try:
        write(*args)
    except Exception as error:  # an assertion about one of its threads, for one
        results.put(RuntimeError(f"a file could not be written ({error}); is the disk full?"))
    _hash_part(part, rank, digests)


def _as_child(parent: int, function: Callable[..., None], *args: Any) -> None:
    """Calls a function in a process that does not outlive the one it was forked from.

    It would go on writing into a folder that the next start of the run makes anew.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        function(*args)


def _hash_part(part: Path, rank: int, digests: _ResultFile) -> None:
    try:
        digests.put(own_digests(part, rank))
    except OSError as error:
        digests.put(str(error))
