"""Which run a checkpoint belongs to, and where checkpoints lie: `run_dir/checkpoints/step-00000500/`.

`info.json` beside the weights says which phase, model, base, data and settings the run has. Resuming with others
refuses and says what differs; how the model is divided, and over how many processes, is free.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.json_files import read_json_object
from common.paths import within
from pipeline.config import PROJECTOR_WORDS, RunConfig
from pipeline.config_text import explain
from pipeline.fingerprints import base_fingerprint, tokenizer_fingerprint

PRECISION = {"fp32": {"precision"}, "bf16": {"precision"}, "fp8": {"precision", "fp8_recipe", "bf16_edge_layers"}}


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint must share with the run that resumes from it; kept beside the weights in `info.json`."""

    phase: str
    model: dict[str, Any]
    base: str
    projector: str
    shards: list[list[Any]]
    tokenizer: str
    template: str
    special_tokens: str
    image_aspect_ratio: str
    max_positions: int
    max_text_tokens_per_pack: int
    max_images_per_pack: int
    shards_in_use: int
    global_batch_size: int
    seed: int
    precision: dict[str, Any]
    exact_images: bool
    optim: dict[str, Any]
    num_steps: int


def describe_run(config: RunConfig, shard_fingerprints: list[str], num_steps: int) -> RunInfo:
    """Returns the facts that a resumed run must share."""
    return RunInfo(
        phase=config.phase,
        model=config.model.model_dump(mode="json"),
        base=base_fingerprint(config.init.base),
        projector=config.init.projector if config.init.projector in PROJECTOR_WORDS else "stage 1",
        shards=[[name, source.repeat] for name, source in zip(shard_fingerprints, config.data.shards, strict=True)],
        tokenizer=tokenizer_fingerprint(config.init.base),
        template=config.data.template,
        special_tokens=config.data.special_tokens,
        image_aspect_ratio=config.data.image_aspect_ratio,
        max_positions=config.data.max_positions,
        max_text_tokens_per_pack=config.data.max_text_tokens_per_pack,
        max_images_per_pack=config.data.max_images_per_pack,
        shards_in_use=config.data.shards_in_use,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        precision=config.compute.model_dump(mode="json", include=PRECISION[config.compute.precision]),
        exact_images=config.data.exact_images,
        optim=config.optim.model_dump(mode="json"),
        num_steps=num_steps,
    )


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, newest first."""
    return sorted(run_dir.glob("checkpoints/step-????????"), reverse=True)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest checkpoint of a run, or None."""
    return next(iter(checkpoints_of(run_dir)), None)


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
    info = read_json_object(within(checkpoint, file.name), "name another checkpoint")
    objects = all(isinstance(info.get(name), dict) for name in ("run", "config"))
    if objects and "stage" in info["run"] and "phase" not in info["run"]:
        was = f"`stage={info['run']['stage']}`"
        raise ValueError(
            f"{file}: written by an older version, which has {was} where this one has `phase`; "
            "export it with the version that wrote it and use that as init.base, or name another checkpoint"
        )
    if not (objects and isinstance(info.get("step"), int) and isinstance(info["run"].get("phase"), str)):
        raise ValueError(f"{file}: not written by this project, or damaged; name another checkpoint")
    return info


def stored_config(checkpoint: Path, info: dict[str, Any]) -> RunConfig:
    """Returns the configuration of the run that wrote a checkpoint, but for how often it saved and resumed.

    Raises:
        ValueError: This version has other settings.
    """
    try:
        return RunConfig.model_validate(info["config"] | {"checkpoint": {}})
    except ValidationError as error:
        raise ValueError(
            f"{checkpoint / 'info.json'}: written by another version, or damaged: {explain(error, RunConfig)}; use the "
            "version that wrote it, or another checkpoint"
        ) from None


def check_base(checkpoint: Path, info: dict[str, Any], base: Path) -> None:
    """Makes sure that a checkpoint was trained on this base.

    Raises:
        ValueError: it was not, or the base has changed.
    """
    if not base.is_dir():
        raise ValueError(f"{checkpoint}: its base folder {base} is not here; put it back, or run where it is")
    if info["run"].get("base") != base_fingerprint(base):
        raise ValueError(f"{checkpoint}: was trained on another base than {base}, or that has changed since")


def check_run(checkpoint: Path, info: dict[str, Any], run: RunInfo) -> None:
    """Makes sure that a checkpoint belongs to this run.

    Raises:
        ValueError: It does not; the message says what differs.
    """
    was, now = (_flat(each) for each in (info["run"], asdict(run)))
    differing = [
        f"{name} was {was[name]!r}, is {value!r}" for name, value in now.items() if was.get(name, value) != value
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: belongs to another run: {'; '.join(differing)}. Use the same settings, or another run_dir"
        )
    if unknown := [name for name in now if name not in was]:
        raise ValueError(
            f"{checkpoint}: was written before {', '.join(unknown)} existed, so its run cannot go on here; "
            "use another run_dir, or the version that wrote it"
        )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts with what is inside of one as `section.key`."""
    sections = {name: value for name, value in facts.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": item for name, section in sections.items() for key, item in section.items()}
    return {name: value for name, value in facts.items() if name not in sections} | inner
