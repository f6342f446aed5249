"""Training checkpoints: `run_dir/checkpoints/step-00000500/`, whole or not there.

A checkpoint is written into a `.part` folder and renamed when every rank is done, so that whatever bears its final
name can be resumed from. It holds what the stage trains, the optimizer, and `info.json`: which run this is. Resuming
with another model, other shards or another base refuses and says what differs.
"""

import hashlib
import json
import queue
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.files import sync_folder, write_whole
from model.saisa import SaisaModel
from pipeline.config import RunConfig
from pipeline.lengths import tokenizer_fingerprint
from pipeline.optimizer import load_optimizer_state

MIB = 1 << 20
SHARDING = "dp_reshardable"  # optimizer states can be read back by another number of data-parallel ranks


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint must share with the run that resumes from it; kept beside the weights in `info.json`."""

    stage: str
    model: dict[str, Any]
    base: str
    projector: str
    shards: list[list[Any]]
    tokenizer: str
    template: str
    image_aspect_ratio: str
    max_positions: int
    max_text_tokens_per_pack: int
    max_images_per_pack: int
    shards_in_use: int
    global_batch_size: int
    seed: int
    precision: str
    optim: dict[str, Any]
    num_steps: int


def describe_run(config: RunConfig, shard_fingerprints: list[str], num_steps: int) -> RunInfo:
    """Returns the facts that a resumed run must share."""
    return RunInfo(
        stage=config.stage,
        model=config.model.model_dump(mode="json"),
        base=base_fingerprint(config.init.base),
        projector=config.init.projector,
        shards=[[name, source.repeat] for name, source in zip(shard_fingerprints, config.data.shards, strict=True)],
        tokenizer=tokenizer_fingerprint(config.init.base),
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
        max_positions=config.data.max_positions,
        max_text_tokens_per_pack=config.data.max_text_tokens_per_pack,
        max_images_per_pack=config.data.max_images_per_pack,
        shards_in_use=config.data.shards_in_use,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        precision=config.train.precision,
        optim=config.optim.model_dump(mode="json"),
        num_steps=num_steps,
    )


def base_fingerprint(base: Path) -> str:
    """Returns a digest of a base folder: its JSON files, and its weight files by size, first MiB and last MiB."""
    digest = hashlib.sha256()
    for file in sorted([*base.glob("*.json"), *base.glob("*.safetensors")]):
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            digest.update(stream.read(MIB))
            stream.seek(max(MIB, size - MIB))
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run, or None."""
    return max(run_dir.glob("checkpoints/step-????????"), default=None)


def find_checkpoint(folder: Path) -> Path:
    """Returns `folder` if it is a checkpoint, or the newest checkpoint in it if it is a run folder.

    Raises:
        ValueError: it is neither.
    """
    found = folder if (folder / "info.json").is_file() else latest_checkpoint(folder)
    if found is None:
        raise ValueError(f"{folder}: no checkpoint here; name a run folder, or a checkpoint such as step-00000500")
    return found


def read_info(checkpoint: Path) -> dict[str, Any]:
    """Returns `info.json`: the run's facts under `run`, the resolved configuration, the step, the code version.

    Raises:
        ValueError: the folder is not a checkpoint of this project, or damaged.
    """
    file = checkpoint / "info.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint}: not a training checkpoint (no info.json); remove it, or name another")
    info = json.loads(file.read_text())
    if not {"step", "run", "config"} <= info.keys():
        raise ValueError(f"{file}: not written by this project, or damaged; name another checkpoint")
    return info


def check_base(checkpoint: Path, info: dict[str, Any], base: Path) -> None:
    """Makes sure that a checkpoint was trained on this base.

    Raises:
        ValueError: it was not, or the base has changed.
    """
    if not base.is_dir():
        raise ValueError(f"{checkpoint}: its base folder {base} is not here; put it back, or run where it is")
    if info["run"].get("base") != base_fingerprint(base):
        raise ValueError(f"{checkpoint}: was trained on another base than {base}, or that has changed since")


def save_checkpoint(
    run_dir: Path,
    step: int,
    run: RunInfo,
    extra_info: dict[str, Any],
    model: SaisaModel,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    keep_last: int,
) -> Path:
    """Writes the state after `step` optimizer steps, drops the oldest checkpoints and returns the new folder."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    part = folder.with_suffix(".part")
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    torch.distributed.barrier()
    # This save is synchronous, so its results need no process of their own: megatron-core would start one to hold the
    # queue, and wait for it to import this whole program.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_sharded_state(model, optimizer, groups, is_loading=False), str(part))
    if is_first:
        info = {"step": step, "run": asdict(run), **extra_info}
        write_whole(part / "info.json", json.dumps(info, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync_folder(folder.parent)
        for old in sorted(folder.parent.glob("step-????????"))[:-keep_last]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return folder


def restore_checkpoint(
    checkpoint: Path, run: RunInfo, model: SaisaModel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection
) -> int:
    """Loads a checkpoint into the model and the optimizer and returns the number of steps it has behind it.

    Raises:
        ValueError: the checkpoint belongs to another run; the message says what differs.
    """
    info = read_info(checkpoint)
    differing = [
        f"{field.name} was {info['run'].get(field.name)!r}, is {getattr(run, field.name)!r}"
        for field in fields(run)
        if info["run"].get(field.name) != getattr(run, field.name)
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: belongs to another run: {'; '.join(differing)}. Use the same settings, or another run_dir"
        )
    sharded = _sharded_state(model, optimizer, groups, is_loading=True)
    state = _load(sharded, checkpoint)
    model.load_state_dict(state["model"], strict=False)
    load_optimizer_state(optimizer, state["optimizer"])
    return info["step"]


def load_trained_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the whole (unsharded) parameters a checkpoint holds, by our names, without the optimizer."""
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    wanted = {key: tensor for key, tensor in metadata.items() if not key.startswith("optimizer.")}
    state = _load(wanted, checkpoint, validate_access_integrity=False)
    return {key: state[key] for key in wanted}


def _load(sharded: dict[str, Any], checkpoint: Path, **options: Any) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], dist_checkpointing.load(sharded, str(checkpoint), **options))
    except CheckpointException as error:  # not an Exception in torch, so nobody else would see it
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{checkpoint}: damaged ({first}); remove it to use the one before it") from None


def _sharded_state(
    model: SaisaModel, optimizer: MegatronOptimizer, groups: ProcessGroupCollection, is_loading: bool
) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": SHARDING, "dp_cp_group": groups.dp_cp}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = model.sharded_state_dict(metadata=metadata)
    state = {name: tensor for name, tensor in whole.items() if name in trained}
    return {"model": state, "optimizer": optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)}
