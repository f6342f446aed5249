"""Writes training checkpoints: whole or not there.

A checkpoint is written into a `.part` folder and renamed when every process is done, so that whatever bears its final
name can be resumed from. Megatron-core plans which process writes what and copies it out of the GPU; the files are
written and finished here, since of its own code an error ends one process while the others wait, and tells of torch's
zip format where a disk is full.
"""

import ctypes
import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from rich.filesize import decimal
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from common.files import named_errors, sync_folder, write_whole
from common.write_errors import os_error_in, way_out
from pipeline.checkpoint.integrity import own_digests, write_manifest
from pipeline.checkpoint.run_info import RunInfo, latest_checkpoint
from pipeline.distributed import broadcast_from_rank0

FILES_PER_PROCESS = 4  # each has a thread that writes it and one that hashes it
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends

type Written = tuple[list[WriteResult], dict[str, str]]
"""What a process says of the files it wrote: where each tensor lies, and the digest of each file."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; a context manager that ends when the last is whole.

    In the background, training goes on as soon as the state is copied; a process forked from each writes and hashes its
    part. `is_writing` asks no other process: each step sums it up with its loss, and when nobody writes any more, all
    call `publish`, which gives the checkpoint its name.
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
        self.child = TemporalAsyncCaller()
        self.finish: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        broadcast_from_rank0(self._remove_old)  # a kill may have come before
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.publish()
        else:
            self.child.close(abort=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state (from `sharded_state`) after `step` optimizer steps.

        Raises:
            OSError: On every process: one could not write.
        """
        self.publish()
        part = self.folder / f"step-{step:08d}.part"
        broadcast_from_rank0(lambda: self._make(part))
        strategy, answer = _Plan(thread_count=FILES_PER_PROCESS), _Answer()
        filesystem_async._results_queue = answer  # or it would start a process only to hold a queue
        request: Any = dist_checkpointing.save(
            state, str(part), sharded_strategy=strategy, async_sharded_save=True, async_strategy="mcore"
        )
        if request.async_fn is None:  # this process has nothing to write
            answer.put(([], {}))
        else:
            write = partial(_write_part, strategy.writer.transforms, part)
            request = request._replace(async_fn=partial(_as_child, os.getpid(), write) if self.in_background else write)
        request = request._replace(finalize_fns=[])
        self.finish = partial(self._finish, step, part, strategy, answer)
        if self.in_background:
            self.child.schedule_async_call(request)
        else:
            request.execute_sync()
            self.publish()

    def is_writing(self) -> bool:
        """Whether this process's part of a checkpoint is still being written."""
        return self.child.process is not None and self.child.process.is_alive()

    def publish(self) -> None:
        """Gives what is written its name, after waiting for all who still write; all processes call it.

        Raises:
            OSError: On every process: one could not write, hash or name its part.
        """
        finish, self.finish = self.finish, None
        if finish is not None:
            self.child.close()
            finish()

    def _finish(self, step: int, part: Path, strategy: "_Plan", answer: "_Answer") -> None:
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        answers: list[Any] | None = [None] * num_ranks if rank == 0 else None
        torch.distributed.gather_object(answer.get(), answers, dst=0)
        folder = broadcast_from_rank0(lambda: self._name(step, part, strategy, answers or []))
        self.say(f"saved {folder}")

    def _make(self, part: Path) -> None:
        with self._explained(part), named_errors(part):
            part.mkdir(parents=True)

    def _name(self, step: int, part: Path, strategy: "_Plan", answers: list[Written | OSError]) -> Path:
        with self._explained(part, strategy.num_bytes), named_errors(part):
            written = _all_written(answers)
            assert strategy.metadata is not None
            with named_errors(part / ".metadata"):
                strategy.writer.finish(strategy.metadata, [results for results, _ in written])
            with named_errors(part / "metadata.json"):
                save_config(CheckpointingConfig(strategy.backend, strategy.version), str(part))
            info = {"step": step, "run": asdict(self.run), **self.extra_info}
            write_whole(part / "info.json", json.dumps(info, indent=1).encode())
            write_manifest(part, {name: digest for _, digests in written for name, digest in digests.items()})
            folder = part.with_suffix("")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            sync_folder(folder.parent)
        self._remove_old()
        return folder

    @contextmanager
    def _explained(self, part: Path, num_bytes: int = 0) -> Iterator[None]:
        """Removes what was written in vain, and says in one line why, what to do, and where the run can go on."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            is_inside = error.filename is not None and part in Path(error.filename).parents
            where = f" ({error.filename})" if is_inside else ""
            is_full = num_bytes and error.errno in (errno.ENOSPC, errno.EDQUOT)
            size = f"; it takes {decimal(num_bytes)}" if is_full else ""
            whole = latest_checkpoint(part.parent.parent)
            last = f"{whole.name} is whole, the run goes on from there" if whole else "there is no checkpoint yet"
            raise OSError(
                f"{part.with_suffix('')} could not be written: {error.strerror or error}{where}{size}{way_out(error)}; "
                f"{last}"
            ) from error

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


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron-core's plan of who writes what, which keeps what finishing takes instead of finishing by itself."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None
    """Of the whole checkpoint, on the first process."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        assert self.metadata is not None
        entries = self.metadata.state_dict_metadata.values()
        tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
        return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)


class _Answer:
    """What a process tells of the files it wrote, also one forked for it, which is read once that has ended.

    In memory that both have: a disk may be full, and a pipe holds 64 KiB, the results of some 450 tensors.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "w+b")

    def put(self, content: Written | OSError) -> None:
        pickle.dump(content, self._file)
        self._file.flush()

    def get(self) -> Written | OSError:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return OSError("the process that wrote it was ended before it was done (out of memory?)")


def _all_written(answers: list[Written | OSError]) -> list[Written]:
    """Returns what the processes wrote, by rank.

    Raises:
        OSError: The first that could not write.
    """
    written: list[Written] = []
    for answer in answers:
        if isinstance(answer, OSError):
            raise answer
        written.append(answer)
    return written


def _write_part(transforms: Any, part: Path, rank: int, buckets: list[WriteBucket], answer: _Answer) -> None:
    """Writes and hashes this process's files and tells what came of it."""
    try:
        with ThreadPoolExecutor(len(buckets)) as threads:
            results = list(threads.map(partial(_write_file, transforms), buckets))
        with named_errors(part):
            answer.put(([*chain.from_iterable(results)], own_digests(part, rank)))
    except Exception as error:
        answer.put(error if isinstance(error, OSError) else OSError(repr(error)))


def _write_file(transforms: Any, bucket: WriteBucket) -> list[WriteResult]:
    answer: Any = FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, None, None, use_fsync=True)
    outcome = answer[1]
    if isinstance(outcome, Exception):
        found = os_error_in(outcome)
        if found is None:
            raise OSError(f"{bucket[0]}: {' '.join(str(outcome).split())[:300]}")
        raise OSError(found.errno, found.strerror, str(bucket[0]))
    return outcome


def _as_child(parent: int, function: Callable[..., None], *args: Any) -> None:
    """Calls a function in a process that does not outlive the one it was forked from.

    It would go on writing into a folder that the next start of the run makes anew.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        function(*args)
