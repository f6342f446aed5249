"""From published checkpoints to a folder of ours.

    compose_base      a language model folder + a vision encoder folder  ->  a base, where training starts
    convert_release   a LLaVA-1.5, or a SAISA in its authors' layout  ->  an export, which chats

Tensors go from the source's files to ours one at a time. `model.hf_source` and `model.llava_source` say what can be
read and what is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.console import count_text
from model.hf.configuration_saisa import SaisaConfig
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf.processing_saisa import IMAGE_TOKEN
from model.hf_folder import add_image_token, weight_shapes, write_hf_folder
from model.hf_read import WAY_OUT, named
from model.hf_shards import HEAD
from model.hf_source import (
    Named,
    llm_fields,
    load_image_processor,
    load_tokenizer,
    read_checkpoint,
    read_json,
    vision_fields,
)
from model.llava_source import read_release, tensors_of_release
from model.timm_source import read_timm_folder, timm_fields, timm_image_processor, timm_tensors

TOWER = "model.vision_tower."
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
    vision_select_layer: int | None = None,
    image_size: int | None = None,
    image_aspect_ratio: str = "pad",
    max_positions: int | None = None,
    dtype: torch.dtype | None = None,
) -> SaisaConfig:
    """Returns the configuration of the base that it writes to `out`.

    Args:
        chat_template: Jinja template stored with the processor.
        stop_token: token that ends an answer besides EOS.
        vision_select_layer: hidden state that projectors read; None: the penultimate, or the last stage of a
            convolutional network.
        image_size: pixels, if not those that a convolutional encoder was trained with.
        max_positions: use the language model up to this many positions only.
        dtype: to store weights in; None keeps each checkpoint's own.

    Raises:
        ValueError: a checkpoint is of an unsupported kind, or incomplete.
    """
    with named(llm):
        fields = llm_fields(llm, read_json(llm / "config.json"), max_positions)
        tokenizer = load_tokenizer(llm)
    with named(vision):
        fields |= _describe_encoder(vision, vision_select_layer, image_size) | {"projector_type": projector_type}
    config = _build_config(fields, tokenizer)

    def tensors() -> Iterator[Named]:
        for name, tensor in read_checkpoint(llm):
            if not (COMPUTED.search(name) or _is_tied(name, config)):
                yield name, tensor
        yield from _vision_tensors(vision, config)

    image_processor = _image_processor(vision, image_aspect_ratio, config)
    write_hf_folder(
        out, config, tensors(), tokenizer, image_processor, chat_template,
        is_base=True, stop_token=stop_token, dtype=dtype,
    )  # fmt: skip
    return config


def convert_release(
    release: Path,
    vision: Path | None,
    out: Path,
    *,
    chat_template: str | None = None,
    stop_token: str | None = None,
    max_positions: int | None = None,
    dtype: torch.dtype | None = None,
) -> SaisaConfig:
    """Returns the configuration of the export that it writes to `out`.

    Args:
        release: a LLaVA-1.5, in its own layout or in that of transformers, or a SAISA in the layout of its authors.
        vision: the folder of its encoder, for layouts that name it without describing it; its weights count where
            the release brings none.

    Raises:
        ValueError: the checkpoint is of an unsupported kind, or incomplete.
    """
    with named(release):
        found = read_release(release, vision, max_positions)
        tokenizer = load_tokenizer(release)
    config = _build_config(found.fields, tokenizer)
    if found.image_token_id not in (None, config.image_token_id):
        raise ValueError(
            f"{release}: image_token_index={found.image_token_id}, but the id of {IMAGE_TOKEN} in its tokenizer is "
            f"{config.image_token_id}; use the tokenizer files of the same repository"
        )

    def tensors() -> Iterator[Named]:
        for name, tensor in tensors_of_release(release, found.layout):
            if not (COMPUTED.search(name) or _is_tied(name, config)):
                yield name, tensor
        if not found.brings_encoder:
            yield from _vision_tensors(found.encoder, config)

    image_processor = load_image_processor(found.encoder, found.image_aspect_ratio, config.vision_config.image_size)
    write_hf_folder(
        out, config, tensors(), tokenizer, image_processor, chat_template, stop_token=stop_token, dtype=dtype
    )
    return config


def _build_config(fields: dict[str, Any], tokenizer: Any) -> SaisaConfig:
    image_token_id = add_image_token(tokenizer, fields["vocab_size"])
    return SaisaConfig(**fields, image_token_id=image_token_id, pad_token_id=tokenizer.pad_token_id)


def _is_tied(name: str, config: SaisaConfig) -> bool:
    return name == HEAD and config.tie_word_embeddings


def _describe_encoder(folder: Path, select_layer: int | None, image_size: int | None) -> dict[str, Any]:
    """Returns what a `SaisaConfig` says of an encoder, and of the hidden state that projectors read."""
    if source := read_timm_folder(folder):
        described, select_layer = timm_fields(source, image_size, select_layer)
    elif image_size is not None:
        raise ValueError(f"{folder}: --image-size is for encoders of timm; CLIP and SigLIP take their own")
    else:
        described = vision_fields(folder, read_json(folder / "config.json"))
        select_layer = -2 if select_layer is None else select_layer
    return {"vision_config": described, "vision_select_layer": select_layer}


def _image_processor(folder: Path, image_aspect_ratio: str, config: SaisaConfig) -> SaisaImageProcessor:
    image_size = config.vision_config.image_size
    with named(folder):
        if source := read_timm_folder(folder):
            return timm_image_processor(source, image_aspect_ratio, image_size)
    return load_image_processor(folder, image_aspect_ratio, image_size)


def _vision_tensors(folder: Path, config: SaisaConfig) -> Iterator[Named]:
    """Yields the encoder's tensors under our names; a text tower beside it is left behind.

    An encoder that transformers 5 has saved alone has no prefix.

    Raises:
        ValueError: they are not those of the encoder that the folder describes.
    """
    if source := read_timm_folder(folder):
        yield from timm_tensors(source, config, read_checkpoint(folder))
        return
    expected = {name: shape for name, shape in weight_shapes(config, is_base=True).items() if name.startswith(TOWER)}
    for name, tensor in read_checkpoint(folder):
        if name.startswith(PARTS_OF_ENCODER):
            name = f"vision_model.{name}"
        if name.startswith("vision_model.") and not COMPUTED.search(name):
            if (shape := expected.pop(TOWER + name, None)) != tensor.shape:
                told = f"of shape {list(shape)}" if shape else "not there"
                raise ValueError(
                    f"{folder}: {name} has shape {list(tensor.shape)}, by config.json it is {told}; {WAY_OUT}"
                )
            yield TOWER + name, tensor
    if expected:
        raise ValueError(
            f"{folder}: {count_text(len(expected), 'weight')} of the encoder in config.json missing, such as "
            f"{min(expected).removeprefix(TOWER)}; {WAY_OUT}"
        )
