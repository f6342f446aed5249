"""From published checkpoints to a folder of ours.

    compose_base      a language model folder + a vision encoder folder  ->  a base, where training starts
    convert_release   a checkpoint in the layout of the authors' release  ->  an export, which chats

Tensors go from the source's files to ours one at a time. `model.hf_source` says what can be read and what is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model.hf.configuration_saisa import SaisaConfig
from model.hf_folder import add_image_token, write_hf_folder
from model.hf_read import named
from model.hf_source import (
    Named,
    llm_fields,
    load_image_processor,
    load_tokenizer,
    read_checkpoint,
    read_json,
    vision_fields,
)

RELEASES = {"llava_llama": "llama", "llava_mistral": "mistral"}
# Tables that older versions of transformers stored beside the weights and newer ones compute.
PARTS_OF_ENCODER = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")
COMPUTED = re.compile(r"\.(inv_freq|position_ids)$")


def compose_base(
    llm: Path,
    vision: Path,
    out: Path,
    *,
    chat_template: str | None = None,
    stop_token: str | None = None,
    projector_type: str = "mlp",
    vision_select_layer: int = -2,
    image_aspect_ratio: str = "pad",
    max_positions: int | None = None,
    dtype: torch.dtype | None = None,
) -> SaisaConfig:
    """Returns the configuration of the base that it writes to `out`.

    Args:
        chat_template: Jinja template stored with the processor.
        stop_token: token that ends an answer besides EOS.
        max_positions: use the language model up to this many positions only.
        dtype: to store weights in; None keeps each checkpoint's own.

    Raises:
        ValueError: a checkpoint is of an unsupported kind, or incomplete.
    """
    with named(llm):
        fields = llm_fields(llm, read_json(llm / "config.json"), max_positions)
        tokenizer = load_tokenizer(llm)
    config = _build_config(fields, tokenizer, vision, vision_select_layer, projector_type)

    def tensors() -> Iterator[Named]:
        for name, tensor in read_checkpoint(llm):
            if not COMPUTED.search(name) and not (name == "lm_head.weight" and config.tie_word_embeddings):
                yield name, tensor
        yield from _vision_tensors(vision)

    image_processor = load_image_processor(vision, image_aspect_ratio, config.vision_config.image_size)
    write_hf_folder(
        out, config, tensors(), tokenizer, image_processor, chat_template,
        is_base=True, stop_token=stop_token, dtype=dtype,
    )  # fmt: skip
    return config


def convert_release(
    release: Path,
    vision: Path,
    out: Path,
    *,
    chat_template: str | None = None,
    stop_token: str | None = None,
    max_positions: int | None = None,
    dtype: torch.dtype | None = None,
) -> SaisaConfig:
    """Returns the configuration of the export that it writes to `out`, from the authors' layout.

    A release names its vision encoder without describing it, so `vision` gives its configuration, and its weights
    where the release lacks them. The release's `model.mm_projector`, left over from LLaVA, is not used by SAISA.

    Raises:
        ValueError: the checkpoint is of an unsupported kind, or incomplete.
    """
    raw = read_json(release / "config.json")
    if str(raw.get("model_type")) not in RELEASES:
        raise ValueError(f"{release}: model_type={raw.get('model_type')!r} must be one of {', '.join(RELEASES)}")
    if raw.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(f"{release}: mm_vision_select_feature={raw['mm_vision_select_feature']!r} must be 'patch'")
    with named(release):
        fields = llm_fields(release, raw | {"model_type": RELEASES[raw["model_type"]]}, max_positions)
        tokenizer = load_tokenizer(release)
    projector_type = "linear" if raw.get("mm_projector_type") == "linear" else "mlp"
    config = _build_config(fields, tokenizer, vision, raw.get("mm_vision_select_layer", -2), projector_type)

    def tensors() -> Iterator[Named]:
        brings_encoder = False
        for name, tensor in read_checkpoint(release):
            if name.startswith("model.vision_tower.vision_tower."):
                brings_encoder = True
                name = name.replace("model.vision_tower.vision_tower.", "model.vision_tower.", 1)
            if not COMPUTED.search(name) and not name.startswith("model.mm_projector."):
                yield name, tensor
        if not brings_encoder:
            yield from _vision_tensors(vision)

    aspect_ratio = raw.get("image_aspect_ratio", "pad")
    image_processor = load_image_processor(vision, aspect_ratio, config.vision_config.image_size)
    write_hf_folder(
        out, config, tensors(), tokenizer, image_processor, chat_template, stop_token=stop_token, dtype=dtype
    )
    return config


def _build_config(
    fields: dict[str, Any], tokenizer: Any, vision: Path, select_layer: int, projector_type: str
) -> SaisaConfig:
    with named(vision):
        described = vision_fields(vision)
    return SaisaConfig(
        **fields,
        vision_config=described,
        vision_select_layer=select_layer,
        projector_type=projector_type,
        image_token_id=add_image_token(tokenizer, fields["vocab_size"]),
        pad_token_id=tokenizer.pad_token_id,
    )


def _vision_tensors(folder: Path) -> Iterator[Named]:
    """Yields the encoder's tensors under our names; a text tower beside it is left behind.

    An encoder that transformers 5 has saved alone has no prefix.
    """
    for name, tensor in read_checkpoint(folder):
        if name.startswith(PARTS_OF_ENCODER):
            name = f"vision_model.{name}"
        if name.startswith("vision_model.") and not COMPUTED.search(name):
            yield f"model.vision_tower.{name}", tensor
