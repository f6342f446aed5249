"""One YAML file is one run. Defaults < YAML < `section.key=value` on the command line.

    phase: pretrain
    model: models/saisa-vicuna-7b.yaml     # a section may be the path of a file, relative to this one
    init: {base: bases/vicuna-7b}
    data: {shards: data/llava-558k, template: plain, ...}

Every section is a frozen model that forbids unknown keys. `load_config` raises `UsageError` with one line that names
the setting, its value, the rule and the way out.
"""

from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from common.console import UsageError
from model.config import ComputeConfig, ModelConfig, Phase, Section
from model.parallel import ParallelConfig, check_split
from pipeline.config_text import apply_override, explain, nearest, read_yaml
from pipeline.data.templates import TEMPLATES, SpecialTokens

PROJECTOR_WORDS = ("random", "base")


class InitConfig(Section):
    """Where the weights come from."""

    base: Path = Field(description="folder written by `make import-hf`, or an exported checkpoint")
    projector: str = Field(
        default="random",
        description="`random`, `base` (an export has projectors) or a run folder of stage 1",
    )


class ShardSource(Section):
    """One shard set of a mixture."""

    location: str = Field(description="folder or URL written by `make shards`")
    repeat: float = Field(default=1.0, gt=0, description="how often an epoch brings each sample; 0.5: every other one")


class DataConfig(Section):
    """Which samples, and how they become packs."""

    shards: tuple[ShardSource, ...] = Field(min_length=1, description="a location, or a list of locations with repeats")
    cache: Path = Field(
        default=Path("runs/cache"), description="folder for token lengths and for shards from a URL: a fast local disk"
    )
    cache_limit: ByteSize | None = Field(default=None, description="most bytes of shards in the cache, such as 200GB")
    shards_in_use: int = Field(default=32, gt=0, le=32, description="shards that are mixed at a time")
    template: str = Field(description=f"one of {', '.join(TEMPLATES)}")
    special_tokens: SpecialTokens = Field(
        default="refuse",
        description="a text that spells one (</s>): refuse its row, or encode it as plain text",
    )
    image_aspect_ratio: Literal["square", "pad"] = "square"
    max_positions: int = Field(
        default=2048, gt=0, description="positions of a sample, visual and text; the rest is cut"
    )
    max_text_tokens_per_pack: int = Field(default=2048, gt=0)
    max_images_per_pack: int = Field(default=8, gt=0)
    row_multiple: int = Field(default=1, gt=0, description="rows of a pack are filled up to a multiple of this")
    exact_images: bool = Field(default=False, description="Pillow's pixels for JPEG too: slower, within 1/255 or so")
    max_bad_samples: int = Field(
        default=0, ge=0, description="samples with an image that does not decode, which a run may leave out and count"
    )
    num_workers: int = Field(default=0, ge=0, description="processes that prepare batches; 0: a thread of the trainer")
    prefetch_steps: int = Field(default=2, ge=0, description="steps prepared ahead, by each worker process if any")

    @field_validator("shards", mode="before")
    @classmethod
    def _list_of_sources(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        return [{"location": str(item)} if isinstance(item, str | Path) else item for item in values]


class OptimConfig(Section):
    """AdamW and its schedule. Source: SAISA table 8; betas, epsilon and clipping as LLaVA-1.5's scripts leave them."""

    learning_rate: float = Field(gt=0)
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, description="of all that is trained, biases and norms too")
    adam_beta1: float = Field(default=0.9, gt=0, lt=1)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float = Field(default=1.0, ge=0, description="0 turns clipping off")
    moments: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: 4 bytes a parameter less; on GPUs")


class TrainConfig(Section):
    """How long, how much at once, and how precisely."""

    global_batch_size: int = Field(gt=0, description="samples per optimizer step, whatever the number of machines")
    num_epochs: int = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0, description="stop (and end the schedule) here, if sooner")
    seed: int = Field(default=0, ge=0)
    image_batch_size: int = Field(default=64, gt=0, description="images the frozen encoder takes at once")
    gc_every_steps: int = Field(
        default=50, gt=0, description="Python collects garbage then alone, on all processes at once: none waits for one"
    )


class CheckpointConfig(Section):
    """When training state is saved."""

    save_every_steps: int = Field(default=500, gt=0)
    keep_last: int = Field(default=2, gt=0)
    in_background: bool = Field(
        default=False,
        description="training goes on while a forked process writes; a kill then loses up to twice save_every_steps",
    )
    resume: Literal["auto", "newest_whole"] = Field(
        default="auto", description="auto: from the newest checkpoint, if any; newest_whole: damaged ones are set aside"
    )

    @field_validator("resume", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if value == "previous":
            raise ValueError("checkpoint.resume='previous' is called newest_whole now, which it meant; use that word")
        return value


class LogConfig(Section):
    """What a run reports. `metrics.jsonl` always has every step."""

    every_steps: int = Field(default=10, gt=0, description="steps between lines where the output is not a terminal")
    tensorboard: bool = True
    wandb_project: str | None = Field(default=None, description="Weights & Biases; the package must be installed")
    peak_tflops: float | None = Field(default=None, gt=0, description="of the chip in bf16, for MFU; known for some")
    profile_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step that torch's profiler records into run_dir/profile, [20,23]"
    )
    nvtx: bool = Field(default=False, description="name the parts of a step for Nsight Systems; needs a GPU")

    @field_validator("profile_steps", mode="wrap")
    @classmethod
    def _check_steps(cls, value: Any, validate: Callable[[Any], tuple[int, int] | None]) -> tuple[int, int] | None:
        try:
            steps = validate(value)
        except ValidationError:
            steps = (0, 0)
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            given = str(value).replace("'", "")
            raise ValueError(
                f"log.profile_steps={given} must be a first and a last step, counted from 1; use [20,23] for instance"
            )
        return steps


class RunConfig(Section):
    """A whole run."""

    phase: Phase
    run_dir: Path
    model: ModelConfig
    init: InitConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def shared_projector(self) -> bool:
        """Whether one projector serves all layers, as in stage 1."""
        return self.model.shares_projector(self.phase)

    @property
    def row_multiple(self) -> int:
        """What the text rows and the visual rows of a pack are each filled up to a multiple of."""
        num_parts = self.parallel.num_row_parts
        return lcm(self.data.row_multiple, self.compute.kernel_rows(are_divided=num_parts > 1) * num_parts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        data, model = self.data, self.model
        check_split(model, self.parallel)
        if self.parallel.reduce_in_bf16 and self.compute.precision == "fp32":
            raise ValueError(
                "parallel.reduce_in_bf16=true halves the gradients of weights in bf16, and compute.precision=fp32 has "
                "none; use compute.precision=bf16 or fp8, or leave it false"
            )
        if data.template not in TEMPLATES:
            raise ValueError(
                f"data.template={data.template!r} is unknown{nearest(data.template, TEMPLATES)}; "
                f"use one of {', '.join(TEMPLATES)}"
            )
        if self.compute.fp8_weights and self.phase == "pretrain":
            raise ValueError(
                "compute.fp8_weights=true with phase=pretrain: checkpoints keep fp32 copies of trained weights alone, "
                "and stage 1 leaves the layers' as they are; use compute.fp8_weights=false, it fits without"
            )
        projectors_first = self.phase == "pretrain" and not self.shared_projector
        if projectors_first and self.compute.precision == "fp8" and self.compute.recompute != "none":
            raise ValueError(
                f"compute.recompute={self.compute.recompute} with compute.precision=fp8 and "
                "model.pretrain_projectors=own: Transformer Engine gives no gradient where an input needs none, "
                "as in the first layer; use compute.recompute=none"
            )
        if self.compute.fp8_weights and not model.trains_language_model(self.phase):
            raise ValueError(
                "compute.fp8_weights=true with model.architecture=flamingo, whose language model stays as it is, and "
                "checkpoints keep fp32 copies of trained weights alone; use compute.fp8_weights=false"
            )
        if self.compute.attention == "block" and model.cross_attention:
            raise ValueError(
                "compute.attention=block with model.architecture=flamingo: blocks of cross-attention have no such "
                "kernel; use compute.attention=auto"
            )
        if data.max_positions > model.max_positions:
            raise ValueError(
                f"data.max_positions={data.max_positions} must be at most model.max_positions={model.max_positions}: "
                f"the language model knows no position beyond; use data.max_positions={model.max_positions}"
            )
        if data.max_text_tokens_per_pack < data.max_positions:
            raise ValueError(
                f"data.max_text_tokens_per_pack={data.max_text_tokens_per_pack} must be at least "
                f"data.max_positions={data.max_positions}: one sample may have that many text tokens"
            )
        if self.phase == "pretrain" and self.init.projector != "random":
            raise ValueError(
                f"init.projector={self.init.projector!r} is for phase: finetune; a pretrain starts a new one: "
                "use init.projector=random"
            )
        if self.phase == "finetune" and self.init.projector == "random":
            raise ValueError(
                "init.projector='random' is for phase: pretrain; a finetune starts from projectors: set init.projector "
                "to the run folder of stage 1, or to 'base' if init.base is an exported checkpoint"
            )
        return self


def check_base_folder(base: Path) -> None:
    """Makes sure that a folder looks like a base.

    Raises:
        ValueError: It does not.
    """
    if not (base / "config.json").is_file():
        raise ValueError(
            f"{base}: no base folder here (no config.json); make one with `make import-hf` or `make tiny-base`"
        )


def check_places(config: RunConfig) -> None:
    """Makes sure that the folders a run starts from are there, before anything that takes long.

    Raises:
        ValueError: One is not.
    """
    check_base_folder(config.init.base)
    stage1 = Path(config.init.projector)
    if config.init.projector not in PROJECTOR_WORDS and not stage1.is_dir():
        raise ValueError(f"init.projector={stage1}: no such folder; run stage 1 first, or name its run folder")


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """Returns the validated run that `path` and the `a.b=c` overrides describe.

    Raises:
        UsageError: one line that names the file or setting, its value, the rule and the way out.
    """
    values = read_yaml(path)
    for key, value in list(values.items()):
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            values[key] = read_yaml(path.parent / value)
    for override in overrides:
        apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, RunConfig)}") from None


def with_resume(overrides: list[str] | None, resume: str | None) -> list[str]:
    """Returns the overrides of a command line, and what its option `--resume` says."""
    return [*(overrides or []), *([f"checkpoint.resume={resume}"] if resume else [])]


def resolve_paths(config: RunConfig, root: Path) -> RunConfig:
    """Returns the run with its relative paths taken from `root`, for processes that start somewhere else."""
    values = config.model_dump()
    for section, key in (("init", "base"), ("data", "cache")):
        values[section][key] = root / values[section][key]
    for source in values["data"]["shards"]:
        if "://" not in source["location"]:
            source["location"] = str(root / source["location"])
    if values["init"]["projector"] not in PROJECTOR_WORDS:
        values["init"]["projector"] = str(root / values["init"]["projector"])
    values["run_dir"] = root / values["run_dir"]
    return RunConfig.model_validate(values)


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
