"""Where a run starts: the base folder's model, processors and weights, and the projectors' first values."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from torch.distributed import ProcessGroup

from model import hf_read
from model.config import PROJECTOR, ModelConfig, model_config_from_hf
from model.flamingo_start import random_blocks
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf_read import load_config
from model.saisa import SaisaModel
from model.weights import (
    Named,
    from_hf,
    load_parameters,
    name_table,
    new_projectors,
    random_projectors,
    read_safetensors,
    spread_shared_projector,
)
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.checkpoint.run_info import check_base, find_checkpoint, read_info
from pipeline.config import RunConfig, check_base_folder


def base_model_config(base: Path) -> ModelConfig:
    """Returns the model a base folder holds.

    Raises:
        ValueError: the folder is not a base.
    """
    check_base_folder(base)
    config = load_config(base)
    with hf_read.named(base / "config.json"):
        return model_config_from_hf(config)


def load_image_processor(base: Path, image_aspect_ratio: str) -> SaisaImageProcessor:
    """Returns the base's image processor, set to `square` or `pad`."""
    return hf_read.load_image_processor(base, image_aspect_ratio=image_aspect_ratio)


def initial_parameters(config: RunConfig, model: SaisaModel, tp_group: ProcessGroup) -> None:
    """Loads the base's weights and the projectors that `init.projector` names into a stage of the model.

    Raises:
        ValueError: weights are missing or do not fit, or the named run has no checkpoint.
    """
    here = {name for name, _ in model.named_parameters()}
    num_image_rows = load_config(config.init.base).num_image_rows
    table = [entry for entry in name_table(config.model, num_image_rows) if entry.ours in here]
    wanted = {name for entry in table for name in entry.theirs}
    stored = read_safetensors(config.init.base, lambda name: name in wanted)
    tensors = chain(from_hf(stored, table), _projectors(config, here))
    load_parameters(model, tensors, tp_group.rank(), tp_group.size())


def _projectors(config: RunConfig, wanted: set[str]) -> Iterator[Named]:
    """Returns the first values of what training adds to the base: projectors, and blocks if there are any."""
    source, seed = config.init.projector, config.train.seed
    if source == "random":
        new = random_projectors(config.model, new_projectors(config.model), seed)
        return chain(random_blocks(config.model, seed, wanted), new)
    if source == "base":
        return iter(())
    checkpoint = find_checkpoint(Path(source))
    info = read_info(checkpoint)
    check_base(checkpoint, info, config.init.base)
    if info["run"]["phase"] != "pretrain":
        raise ValueError(
            f"init.projector={source}: holds a finetune, not a stage 1 run; export it and use it as init.base"
        )
    was, now = info["run"].get("model", {}), config.model.model_dump(mode="json")
    settings = ("architecture", "block_size", *PROJECTOR, "cross_attention", "cross_attention_every")
    names = [name for name in settings if was.get(name) != now[name]]
    if names:
        told = "; ".join(f"model.{name} was {was.get(name)!r}, is {now[name]!r}" for name in names)
        raise ValueError(f"init.projector={source}: is of another model: {told}; run stage 1 with these settings")
    return spread_shared_projector(load_trained_parameters(checkpoint), config.model)
