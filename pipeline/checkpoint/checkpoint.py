"""Training checkpoints: what is in them, and taking them up again, at any topology.

A checkpoint holds what the run trains, the optimizer, random states and `info.json` (see `run_info`), and can be
loaded at any tensor, pipeline and data parallelism. `writer` writes them.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from common.pickles import tell
from model.fp8_state import FP8_STATE, fp8_state_checked, has_fp8_state
from model.saisa import SaisaModel
from pipeline.checkpoint.data_only import check_data, data_only
from pipeline.checkpoint.integrity import damaged_files
from pipeline.checkpoint.owned import Whole, owned_state
from pipeline.checkpoint.run_info import RunInfo, check_run, checkpoints_of, read_info
from pipeline.distributed import broadcast_from_rank0
from pipeline.optimizer import num_updates, set_num_updates

ASIDE = ".set-aside"  # what a damaged checkpoint is called when its run goes on from the one before it
OTHER_VERSION = "perhaps of another version of megatron-core; use that, or another run_dir"


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Returns the checkpoint a run goes on from, or None: `auto` the newest, `newest_whole` past damaged ones.

    All processes call it.

    Raises:
        ValueError: The newest is damaged; with `newest_whole`, all of them.
    """
    checkpoints = broadcast_from_rank0(lambda: checkpoints_of(run_dir))
    for number, checkpoint in enumerate(checkpoints):
        if not (damaged := damaged_files(checkpoint)):
            return checkpoint
        if checkpoint == checkpoints[-1]:
            way_out = "none is left to go on from" if number else "there is no other"
            _refuse(checkpoint, damaged, f"{way_out}; use another run_dir")
        if resume == "auto":
            way_out = f"checkpoint.resume=newest_whole looks for a whole one before it, from {checkpoints[1].name} on"
            _refuse(checkpoint, damaged, way_out)
    return None


def restore_checkpoint(
    checkpoint: Path,
    run: RunInfo,
    stages: list[SaisaModel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
) -> int:
    """Loads a checkpoint into the model and the optimizer and returns the number of steps it has behind it.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run; the message says what differs.
    """
    info = read_info(checkpoint)
    check_run(checkpoint, info, run)
    # Data-parallel ranks need the same weights: each reads a part, and they exchange. What a rank owns it reads itself.
    reads = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), groups.dp_cp)
    wanted = sharded_state(stages, optimizer, groups, is_loading=True)
    in_place = {name: cast(Tensor, entry.data) for name, entry in wanted["optimizer"]["owned"].items()}
    _check_data(checkpoint, OTHER_VERSION)
    with _named_damage(checkpoint, OTHER_VERSION):
        state: Any = dist_checkpointing.load(wanted, str(checkpoint), sharded_strategy=cast(Any, reads))
        for number, stage in enumerate(stages):
            with fp8_state_checked(state[f"stage{number}"]):
                stage.load_state_dict(state[f"stage{number}"], strict=False)
        for name, loaded in state["optimizer"]["owned"].items():
            if not loaded.is_set_to(in_place[name]):  # a stage's copy of the shared projector, say
                in_place[name].copy_(loaded)
        set_num_updates(optimizer, _stored_updates(state["optimizer"]))
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
    """Returns what this process has of a run's state, described so that it can be put together differently.

    Of trained weights a process writes those that it updates, whether or not it has collected the others' since, and
    reads all that its stages have.
    """
    state: dict[str, Any] = {}
    trained: list[Whole] = []
    for number, stage in enumerate(stages):
        whole: dict[str, Any] = stage.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        weights = {name: whole[name] for name, parameter in stage.named_parameters() if parameter.requires_grad}
        scales = {name: entry for name, entry in whole.items() if name.endswith(FP8_STATE)}
        state[f"stage{number}"] = (scales if has_fp8_state(stage.config) else {}) | (weights if is_loading else {})
        trained += weights.values()
    owned = owned_state(optimizer, trained, with_weights=not is_loading)
    return {**state, "optimizer": {"step": num_updates(optimizer), "owned": owned}, "rng": torch.get_rng_state()}


def load_trained_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the whole (unsharded) parameters a checkpoint holds, by our names, without the optimizer."""
    before = [other for other in checkpoints_of(checkpoint.parent.parent) if other.name < checkpoint.name]
    way_out = f"try {before[0]} instead" if before else "there is none before it"
    if damaged := damaged_files(checkpoint):
        _refuse(checkpoint, damaged, way_out)
    _check_data(checkpoint, way_out)
    with _named_damage(checkpoint, way_out):
        metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        wanted = {key: tensor for key, tensor in metadata.items() if not key.startswith("optimizer.")}
        loaded: Any = dist_checkpointing.load(dict(wanted), str(checkpoint), validate_access_integrity=False)
        return {key: loaded[key] for key in wanted}


def _stored_updates(stored: dict[str, Any]) -> int:
    """Returns how often the weights had been updated; up to October 2026 megatron-core wrote it, in every group."""
    return stored["step"] if "step" in stored else int(stored["optimizer"]["param_groups"][0]["step"])


def _check_data(checkpoint: Path, way_out: str) -> None:
    """Lets the first process look for what a checkpoint must not hold; all call it."""

    def check() -> None:
        try:
            check_data(checkpoint)
        except ValueError as error:
            raise _damage(checkpoint, str(error), way_out) from error

    broadcast_from_rank0(check)


def _refuse(checkpoint: Path, damaged: list[str], way_out: str) -> NoReturn:
    """Raises the same on all processes, of which one says it."""

    def refuse() -> None:
        raise _damage(checkpoint, ", ".join(damaged), way_out)

    broadcast_from_rank0(refuse)
    raise AssertionError


@contextmanager
def _named_damage(checkpoint: Path, way_out: str) -> Iterator[None]:
    """Reads data alone, and makes one line of what torch and megatron-core raise about a checkpoint."""
    try:
        with data_only():
            yield
    except (torch.OutOfMemoryError, torch.distributed.DistError, NameError):
        raise  # not its fault
    except (CheckpointException, CheckpointingException, Exception) as error:  # torch's first is no Exception
        raise _damage(checkpoint, first_cause(error), way_out) from error


def _damage(checkpoint: Path, why: str, way_out: str) -> ValueError:
    return ValueError(f"{checkpoint}: damaged ({why}); {way_out}")


def first_cause(error: BaseException) -> str:
    """Returns the first failure that torch gathered from all processes, or the error itself, in one line."""
    if not isinstance(error, CheckpointException):
        first: object = error
    else:  # the process that gathers tells the others no more than that
        first = next((failure[0] for failure in error.failures.values()), "one of the processes failed, and says why")
    return tell(first) if isinstance(first, BaseException) else str(first)
