"""What a LLaVA checkpoint says about itself, in each of the layouts that it comes in.

    llava-hf   `LlavaForConditionalGeneration` of transformers, with the names of its old versions or its new ones
    llava      LLaVA's own: one `model.mm_projector`; the encoder is named and not described, so its folder is given
    saisa      the authors' release of SAISA: the same, with a projector in every layer

Only LLaVA-1.5 is read: one image is one grid of patches. What else there is in LLaVA is refused by name.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model.hf_source import Named, image_settings, llm_fields, read_checkpoint, read_json, vision_fields, weight_names

Layout = Literal["llava-hf", "llava", "saisa"]
RELEASES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava": "llama"}
USE = "use a LLaVA-1.5 checkpoint, such as llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b"
ENCODER_INSIDE = "vision_tower"
"""The encoder's folder in what `make export FORMAT=llava` writes."""
PROJECTORS = {"mlp2x_gelu": "mlp", "linear": "linear"}
PROJECTOR_OF_LAYER = re.compile(r"^model\.layers\.\d+\.mm_projector\.")
OURS = {
    "llava-hf": (
        (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model."),
        (r"^(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),
    ),
    "llava": ((r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),),
}
"""From names in a checkpoint to ours: the first pattern that fits."""


class Release(NamedTuple):
    """What is in a checkpoint.

    Fields:
        layout: How it is written.
        fields: Those of a `SaisaConfig`, but for what the tokenizer says.
        encoder: The folder that says how images are prepared.
        brings_encoder: The encoder's weights are in the checkpoint, not in `encoder`.
        image_aspect_ratio: "pad" or "square".
        image_token_id: The id that stands for an image, if the checkpoint says.
    """

    layout: Layout
    fields: dict[str, Any]
    encoder: Path
    brings_encoder: bool
    image_aspect_ratio: str
    image_token_id: int | None


def read_release(folder: Path, vision: Path | None, max_positions: int | None) -> Release:
    """Returns what is in a checkpoint.

    Args:
        folder: It.
        vision: The folder of its encoder, for layouts that do not describe it.
        max_positions: Use the language model up to this many positions only.

    Raises:
        ValueError: It is none of the layouts, or has something that a model of ours could not represent.
    """
    raw = read_json(folder / "config.json")
    kind = str(raw.get("model_type"))
    if kind == "llava" and "text_config" in raw:
        return _read_llava_hf(folder, vision, raw, max_positions)
    if kind not in RELEASES:
        if "llava" in kind:
            raise ValueError(f"{folder}: model_type={kind!r} is another LLaVA than 1.5, which is not supported; {USE}")
        raise ValueError(
            f"{folder}: model_type={kind!r} is no LLaVA; give a language model as LLM= (--llm), for LLaVA {USE}"
        )
    return _read_own(folder, vision, raw, max_positions)


def tensors_of_release(folder: Path, layout: Layout) -> Iterator[Named]:
    """Yields a checkpoint's tensors under our names.

    The `model.mm_projector` in the authors' release, left over from LLaVA, is not used by SAISA.
    """
    for name, tensor in read_checkpoint(folder):
        if not (layout == "saisa" and name.startswith("model.mm_projector.")):
            yield our_name(name, layout), tensor


def our_name(name: str, layout: Layout) -> str:
    """Returns our name of a checkpoint's tensor."""
    for pattern, ours in OURS["llava-hf" if layout == "llava-hf" else "llava"]:
        if found := re.match(pattern, name):
            return ours + name[found.end() :]
    return name


def _read_llava_hf(folder: Path, vision: Path | None, raw: dict[str, Any], max_positions: int | None) -> Release:
    if vision is not None:
        raise ValueError(f"{folder} brings its own encoder; leave out VISION= (--vision)")
    text, described = raw["text_config"], raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(described, dict):
        raise ValueError(f"{folder / 'config.json'}: text_config and vision_config must be objects; download it again")
    _check(folder, raw, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True})
    if raw.get("image_grid_pinpoints"):
        raise ValueError(f"{folder}: image_grid_pinpoints: images in tiles (LLaVA-1.6) are not supported; {USE}")
    layer = raw.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise ValueError(f"{folder}: vision_feature_layer={str(layer)[:40]} must be one layer; {USE}")
    encoder = vision_fields(folder, {"model_type": "clip_vision_model"} | described)
    right = select_strategy(encoder["model_type"])
    if (told := raw.get("vision_feature_select_strategy", "default")) != right:
        raise ValueError(
            f"{folder}: vision_feature_select_strategy={told!r} is not supported with a {encoder['model_type']}, only "
            f"{right!r} (all patches, no class token); {USE}"
        )
    fields = llm_fields(folder, {"model_type": "llama"} | text, max_positions) | {
        "vision_config": encoder,
        "vision_select_layer": layer,
        "projector_type": "mlp",
        "architecture": "llava",
    }
    aspect_ratio = "pad" if image_settings(folder).get("do_pad") else "square"
    return Release("llava-hf", fields, folder, True, aspect_ratio, raw.get("image_token_index", 32000))


def select_strategy(kind: str) -> str:
    """Returns what transformers calls taking all patches of an encoder: CLIP has a class token before them."""
    return "default" if kind.startswith("clip") else "full"


def _read_own(folder: Path, vision: Path | None, raw: dict[str, Any], max_positions: int | None) -> Release:
    _check(
        folder, raw,
        {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_patch_merge_type": "flat",
         "mm_resampler_type": None},
    )  # fmt: skip
    aspect_ratio = raw.get("image_aspect_ratio", "pad")
    if aspect_ratio not in ("pad", "square"):
        raise ValueError(f"{folder}: image_aspect_ratio={aspect_ratio!r} is not supported (LLaVA-1.6's tiles); {USE}")
    names = weight_names(folder)
    layout: Layout = "saisa" if any(map(PROJECTOR_OF_LAYER.match, names)) else "llava"
    if layout == "llava" and not any(name.startswith("model.mm_projector.") for name in names):
        raise ValueError(f"{folder}: no mm_projector among its weights, so it cannot see; {USE}")
    kind = str(raw.get("mm_projector_type", "linear"))
    if layout == "llava" and kind not in PROJECTORS:
        raise ValueError(f"{folder}: mm_projector_type={kind!r} is not supported, only {', '.join(PROJECTORS)}; {USE}")
    inside = folder / ENCODER_INSIDE
    encoder = vision or (inside if inside.is_dir() else None)
    if encoder is None:
        raise ValueError(
            f"{folder} names its encoder (mm_vision_tower={raw.get('mm_vision_tower')!r}) without describing it; give "
            "the folder of that encoder as VISION= (--vision)"
        )
    described = vision_fields(encoder, read_json(encoder / "config.json"))
    width = described["hidden_size"]
    if raw.get("mm_hidden_size", width) != width:
        raise ValueError(
            f"{folder}: mm_hidden_size={raw['mm_hidden_size']}, but the encoder in {encoder} has hidden_size={width}; "
            f"give the one it was trained with, mm_vision_tower={raw.get('mm_vision_tower')!r}"
        )
    fields = llm_fields(folder, raw | {"model_type": RELEASES[raw["model_type"]]}, max_positions) | {
        "vision_config": described,
        "vision_select_layer": raw.get("mm_vision_select_layer", -2),
        "projector_type": PROJECTORS.get(kind, "mlp"),
        "architecture": layout,
    }
    brings_encoder = any(name.startswith("model.vision_tower.") for name in names)
    return Release(layout, fields, encoder, brings_encoder, aspect_ratio, None)


def _check(folder: Path, raw: dict[str, Any], only: dict[str, Any]) -> None:
    """Refuses settings of LLaVA that a model of ours does not have."""
    for name, value in only.items():
        if raw.get(name) not in (None, value):
            raise ValueError(f"{folder}: {name}={str(raw[name])[:40]!r} must be {value!r}; {USE}")
