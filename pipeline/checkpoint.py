"""Training checkpoints: whole or not there, at any topology.

A checkpoint is written into a `.part` folder and renamed when every process is done, so that whatever bears its final
name can be resumed from. It holds what the stage trains, the optimizer, random states and `info.json` (see
`pipeline.run_info`), and can be loaded at any tensor, pipeline and data parallelism.
"""

import json
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.files import sync_folder, write_whole
from model.saisa import SaisaModel
from pipeline.optimizer import load_optimizer_state
from pipeline.run_info import ASIDE, RunInfo, check_run, read_info

SHARDING = "fully_reshardable"  # optimizer states can be read back at any TP, PP and DP


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; a context manager that ends when the last is whole.

    In the background, training goes on as soon as the state is copied; a forked process writes it, and `poll`, called
    by all processes after every step, has the first of them hash the files and gives the checkpoint its name.
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
        if torch.distributed.get_rank() == 0:
            self._remove_old()  # a kill may have come before
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.poll(wait=True)
        else:
            self.calls.close(abort=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state (from `sharded_state`) after `step` optimizer steps.

        Raises:
            OSError: It could not be written.
        """
        self.poll(wait=True)
        part = self.folder / f"step-{step:08d}.part"
        if torch.distributed.get_rank() == 0:
            part.mkdir(parents=True)
        torch.distributed.barrier()
        # Megatron-core would start a process that imports this whole program, only to hold the queue of results.
        results: Any = get_context("fork").Queue() if self.in_background else queue.Queue()
        filesystem_async._results_queue = results
        with self._named_errors():
            request = dist_checkpointing.save(
                state,
                str(part),
                async_sharded_save=self.in_background,
                async_strategy="mcore",
                verify_integrity=True,  # SHA-256 of every file: torch notices a cut file, but not a changed byte
            )
        if request is None:
            self._publish(step, part)
        else:
            request.add_finalize_fn(lambda: self._publish(step, part))
            self.calls.schedule_async_request(request)

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
        except (RuntimeError, CheckpointException) as error:
            raise OSError(
                f"{self.folder}: a checkpoint could not be written; the one before it is whole: {_cause(error)}"
            ) from error

    def _publish(self, step: int, part: Path) -> None:
        folder = part.with_suffix("")
        if torch.distributed.get_rank() == 0:
            info = {"step": step, "run": asdict(self.run), **self.extra_info}
            write_whole(part / "info.json", json.dumps(info, indent=1).encode())
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            sync_folder(folder.parent)
            self._remove_old()
        torch.distributed.barrier()
        self.say(f"saved {folder}")

    def _remove_old(self) -> None:
        """Removes all but the last checkpoints, none of them by halves under its final name, and unfinished ones."""
        for part in self.folder.glob("*.part"):
            shutil.rmtree(part)
        for old in sorted(self.folder.glob("step-????????"))[: -self.keep_last]:
            shutil.rmtree(old.rename(old.with_suffix(".part")))


def restore_checkpoint(
    checkpoint: Path,
    run: RunInfo,
    stages: list[SaisaModel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> int:
    """Loads a checkpoint into the model and the optimizer and returns the number of steps it has behind it.

    Raises:
        ValueError: The checkpoint is damaged, or belongs to another run; the message says what differs.
    """
    info = read_info(checkpoint)
    check_run(checkpoint, info, run)
    state = _load(sharded_state(stages, optimizer, groups, is_loading=True), checkpoint)
    for number, stage in enumerate(stages):
        stage.load_state_dict(state[f"stage{number}"], strict=False)
    load_optimizer_state(optimizer, state["optimizer"])
    torch.set_rng_state(state["rng"])
    return info["step"]


def set_aside_newer(checkpoint: Path) -> list[Path]:
    """Renames the checkpoints after this one, which a run that goes on from it writes again; returns their names."""
    newer = [other for other in checkpoint.parent.glob("step-????????") if other.name > checkpoint.name]
    for folder in (other.with_name(other.name + ASIDE) for other in newer):
        shutil.rmtree(folder, ignore_errors=True)  # set aside before, and damaged again
    return [other.rename(other.with_name(other.name + ASIDE)) for other in sorted(newer)]


def sharded_state(
    stages: list[SaisaModel], optimizer: MegatronOptimizer, groups: ProcessGroupCollection, is_loading: bool = False
) -> dict[str, Any]:
    """Returns what this process has of a run's state, described so that it can be put together differently."""
    metadata = {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": True,  # one rank of each data-parallel group gathers, not all
        "dp_cp_group": groups.dp_cp,
    }
    state: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
        whole = stage.sharded_state_dict(metadata=metadata)
        state[f"stage{number}"] = {name: tensor for name, tensor in whole.items() if name in trained}
    described = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return {**state, "optimizer": described, "rng": torch.get_rng_state()}


def load_trained_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the whole (unsharded) parameters a checkpoint holds, by our names, without the optimizer."""
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    wanted = {key: tensor for key, tensor in metadata.items() if not key.startswith("optimizer.")}
    state = _load(wanted, checkpoint, validate_access_integrity=False)
    return {key: state[key] for key in wanted}


def _load(sharded: dict[str, Any], checkpoint: Path, **options: Any) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], dist_checkpointing.load(sharded, str(checkpoint), verify_integrity=True, **options))
    except (CheckpointException, CheckpointingException) as error:  # torch's is no Exception: nobody else would see it
        why = _cause(error)
    raise ValueError(f"{checkpoint}: damaged ({why}); checkpoint.resume=previous goes on from the one before it")


def _cause(error: BaseException) -> str:
    """Returns the first failure that torch gathered from all processes, or the error itself, in one line."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    first = next((failure[0] for failure in failures.values()), error)
    return " ".join(str(first).split())[:300]
