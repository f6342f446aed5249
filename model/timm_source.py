"""What a downloaded encoder of timm says about itself: timm's own folders, and open_clip's where they hold one.

    config.json            timm: architecture, pretrained_cfg {input_size, mean, std, interpolation}
    open_clip_config.json  open_clip: model_cfg.vision_cfg.timm_model_name, preprocess_cfg {mean, std}

Nothing of the folder is run: the name must be one that the installed timm knows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from common.console import count_text
from model.hf.configuration_saisa import SaisaConfig
from model.hf.image_processing_saisa import MAX_SIDE, SaisaImageProcessor
from model.hf.timm_saisa import TimmTower, build_trunk, hidden_states
from model.hf_source import Named, read_json

OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_PREFIX = "visual.trunk."  # of the encoder, beside the text tower
MODEL_TYPE = "timm_grid"


class TimmFolder(NamedTuple):
    """What a folder says.

    Fields:
        architecture: timm's name.
        image_size: pixels that it was trained with.
        settings: mean, std and interpolation of its images.
        prefix: before the names of weights.
    """

    architecture: str
    image_size: int
    settings: dict[str, Any]
    prefix: str


def read_timm_folder(folder: Path) -> TimmFolder | None:
    """Returns what an encoder's folder says, or None if it holds no encoder of timm.

    Raises:
        ValueError: Its configuration is damaged.
    """
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "architecture" in raw and "model_type" not in raw:
        settings = raw.get("pretrained_cfg") or {}
        name, sizes = raw["architecture"], settings.get("input_size", [3, 224, 224])
        return TimmFolder(str(name).partition(".")[0], int(sizes[-1]), settings, "")
    if "model_type" not in raw and (folder / OPEN_CLIP).is_file():
        raw = read_json(folder / OPEN_CLIP)
        vision = (raw.get("model_cfg") or {}).get("vision_cfg") or {}
        if name := vision.get("timm_model_name"):
            settings = raw.get("preprocess_cfg") or {}
            return TimmFolder(str(name), int(vision.get("image_size", 224)), settings, OPEN_CLIP_PREFIX)
        raise ValueError(f"{folder / OPEN_CLIP}: not an encoder of timm; use its folder in Hugging Face format")
    return None


def timm_fields(source: TimmFolder, image_size: int | None, select_layer: int | None) -> tuple[dict[str, Any], int]:
    """Returns the `vision_config` of an encoder, and which hidden state projectors read.

    By default it is the last of a network whose stages differ in size, and the penultimate of a transformer, as for
    CLIP. Sizes are found by running the encoder on tensors without values.

    Args:
        source: What the folder says.
        image_size: Pixels; None for those it was trained with. Transformers take no others.
        select_layer: As for CLIP; None for the default.

    Raises:
        ValueError: Its features are no square grid, or it is none that an export can hold.
    """
    name, side = source.architecture, image_size or source.image_size
    if not 0 < side <= MAX_SIDE:
        raise ValueError(f"image_size={side} must be of 1 to {MAX_SIDE} pixels")
    with torch.device("meta"), torch.no_grad():
        trunk = build_trunk(name)
        if tables := _tables(trunk):
            raise ValueError(f"timm's {name} computes tables ({tables[0]}) that no file holds; use another encoder")
        try:
            states = hidden_states(trunk, torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError) as error:
            told = str(error).partition("\n")[0]
            raise ValueError(f"timm's {name} takes no images of {side} pixels ({told}); use its own size") from None
    if select_layer is None:
        select_layer = -2 if len({state.shape for state in states}) == 1 else -1
    number = select_layer if select_layer >= 0 else len(states) + 1 + select_layer
    if not 0 < number <= len(states):
        layers = count_text(len(states), "layer")
        raise ValueError(f"select_layer={select_layer} is none of the {layers} of timm's {name}; use -1")
    _, width, height, columns = states[number - 1].shape
    if height != columns or side // (patch := side // height) != height:
        raise ValueError(
            f"timm's {name} makes {height} x {columns} features of {side} x {side} pixels, and not a square grid whose "
            "places are equal; use another image size or encoder"
        )
    fields = {"model_type": MODEL_TYPE, "architecture": name, "hidden_size": width, "num_hidden_layers": len(states)}
    return fields | {"image_size": side, "patch_size": patch}, select_layer


def timm_tensors(source: TimmFolder, config: SaisaConfig, tensors: Iterator[Named]) -> Iterator[Named]:
    """Yields an encoder's tensors under our names; text towers, classifiers and layers that never run stay behind."""
    with torch.device("meta"):
        tower = TimmTower(config.vision_config, config.vision_select_layer)
    wanted = tower.trunk.state_dict().keys()
    for name, tensor in tensors:
        if name.startswith(source.prefix) and (name := name.removeprefix(source.prefix)) in wanted:
            yield f"model.vision_tower.trunk.{name}", tensor


def timm_image_processor(source: TimmFolder, image_aspect_ratio: str, image_size: int) -> SaisaImageProcessor:
    """Returns an encoder's image processing, which resizes to its square without a crop.

    Raises:
        ValueError: A setting is none of images.
    """
    settings = source.settings
    filters = {filter.name.lower(): int(filter) for filter in Image.Resampling}
    filter = settings.get("interpolation", "bicubic")
    if filter not in filters:
        raise ValueError(f"interpolation={str(filter)[:40]!r} must be one of {', '.join(filters)}")
    sides = {"height": image_size, "width": image_size}
    named = {"image_mean": settings.get("mean"), "image_std": settings.get("std")}
    return SaisaImageProcessor.from_encoder(
        {"size": sides, "resample": filters[filter], **named}, image_aspect_ratio=image_aspect_ratio
    )


def _tables(trunk: nn.Module) -> list[str]:
    """Returns what a model computes when it is built and does not store: transformers would fill it with anything."""
    return sorted(
        f"{name}.{table}" for name, module in trunk.named_modules() for table in module._non_persistent_buffers_set
    )
