"""Writes a model of architecture `llava` in LLaVA's own layout: `make export FORMAT=llava`.

The language model with `model.mm_projector`, and the encoder in `vision_tower/`. `model.llava_source` reads it again,
and `model.llava_hf_folder` writes the layout of transformers.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.files import named_errors
from model.hf.configuration_saisa import SaisaConfig
from model.hf.processing_saisa import IMAGE_TOKEN
from model.hf_folder import ending_at, generation_config, tokenizer_settings, weight_shapes
from model.hf_read import VISION_FIELDS
from model.hf_shards import EMBEDDING, HEAD, whole_folder, write_json, write_weights
from model.hf_source import Named
from model.llava_source import ENCODER_INSIDE

TOWER = "model.vision_tower."
HELD = {"llava-hf": ("mlp",), "llava": ("mlp", "linear")}
"""The projectors that a format can hold."""
LANGUAGE_MODEL_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def check_llava(config: SaisaConfig, form: str) -> None:
    """Makes sure that a format can hold a model.

    Raises:
        ValueError: It cannot.
    """
    vision = config.vision_config.model_type
    is_timm = vision.startswith("timm")
    width = config.num_attention_heads * config.head_dim
    problems = {
        f"model.architecture={config.architecture!r}": config.architecture != "llava",
        f"model.projector={config.projector_type!r}": config.projector_type not in HELD[form],
        f"a {vision}": is_timm or (form == "llava" and not vision.startswith("clip")),
        "a Qwen2": form == "llava" and config.attention_bias,
        f"attention heads of {width} in all and hidden_size={config.hidden_size}": form == "llava"
        and width != config.hidden_size,
    }
    for what, is_there in problems.items():
        if is_there:
            other = "llava-hf" if form == "llava" and config.projector_type in HELD["llava-hf"] else "saisa"
            other = other if config.architecture == "llava" and not is_timm else "saisa"
            raise ValueError(f"FORMAT={form} cannot hold {what}; export with FORMAT={other} (--format {other})")


def write_llava(
    folder: Path,
    config: SaisaConfig,
    tensors: Iterable[Named],
    tokenizer: Any,
    image_processor: Any,
    chat_template: str | None = None,
    *,
    stop_token: str | None = None,
) -> None:
    """Writes LLaVA's own layout, with the encoder as a folder in it; arguments and errors as of `write_hf_folder`.

    LLaVA's vocabulary has no row for an image, its tokenizer no `<image>`, and its prompts are its own code's.
    """
    check_llava(config, "llava")
    num_rows = config.vocab_size - config.num_image_rows
    shapes = weight_shapes(config, is_base=False)
    for name in (EMBEDDING, HEAD):
        if name in shapes:
            shapes[name] = torch.Size((num_rows, config.hidden_size))
    encoder = {name.removeprefix(TOWER): shape for name, shape in shapes.items() if name.startswith(TOWER)}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(TOWER)}
    inside: dict[str, Tensor] = {}

    def language_model() -> Iterator[Named]:
        for name, tensor in tensors:
            if name.startswith(TOWER):
                inside[name.removeprefix(TOWER)] = tensor  # some 600 MB, of CLIP-L
            else:
                yield name, tensor[:num_rows] if name in (EMBEDDING, HEAD) else tensor

    with whole_folder(folder) as part:
        dtype = write_weights(part, rest, language_model(), None)
        (tower := part / ENCODER_INSIDE).mkdir()
        write_weights(tower, encoder, inside.items(), None)
        with named_errors(part):
            write_json(tower / "config.json", vision_settings(config) | {"architectures": ["CLIPVisionModel"]})
            for place in (tower, part):
                write_json(place / "preprocessor_config.json", image_settings(config, image_processor, None))
            told = llava_config(config, image_processor.image_aspect_ratio, str(folder.resolve() / ENCODER_INSIDE))
            write_json(part / "config.json", told | {"torch_dtype": str(dtype).removeprefix("torch.")})
            generation = generation_config(config, tokenizer, stop_token)
            generation.suppress_tokens = None  # there is no such token
            generation.save_pretrained(part)
            write_tokenizer(part, without_image_token(ending_at(tokenizer, stop_token), num_rows))


def llava_config(config: SaisaConfig, image_aspect_ratio: str, encoder: str) -> dict[str, Any]:
    """Returns the config.json of LLaVA's layout. Source: liuhaotian/llava-v1.5-7b."""
    told: dict[str, Any] = {name: getattr(config, name) for name in LANGUAGE_MODEL_FIELDS if name != "head_dim"}
    return told | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": config.vocab_size - config.num_image_rows,
        "hidden_act": "silu",
        "image_aspect_ratio": image_aspect_ratio,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": {"mlp": "mlp2x_gelu", "linear": "linear"}[config.projector_type],
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_select_layer,
        "mm_vision_tower": encoder,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
    }


def without_image_token(tokenizer: Any, vocab_size: int) -> Any:
    """Returns the tokenizer without the `<image>` that ours has beyond the vocabulary; one inside it stays."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) < vocab_size:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != IMAGE_TOKEN]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_input_names=tokenizer.model_input_names,
        **special,
    )


def vision_settings(config: SaisaConfig) -> dict[str, Any]:
    """Returns the encoder's configuration."""
    vision = config.vision_config
    return {name: getattr(vision, name) for name in VISION_FIELDS if hasattr(vision, name)}


def image_settings(config: SaisaConfig, processor: Any, processor_class: str | None) -> dict[str, Any]:
    """Returns the preprocessor_config.json with which transformers' own classes make the same pixels.

    Only LLaVA's class pads to a square; LLaVA itself pads before it calls CLIP's.
    """
    is_padded = processor.image_aspect_ratio == "pad" and processor_class is not None
    plain = "CLIPImageProcessor" if config.vision_config.model_type.startswith("clip") else "SiglipImageProcessor"
    settings = {
        "image_processor_type": "LlavaImageProcessor" if is_padded else plain,
        "do_resize": True,
        "size": processor.size,
        "resample": processor.resample,
        "do_center_crop": processor.crop_size is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "do_convert_rgb": True,
    }
    if processor.crop_size is not None:
        settings["crop_size"] = processor.crop_size
    if is_padded:
        settings["do_pad"] = True
    return settings if processor_class is None else settings | {"processor_class": processor_class}


def write_tokenizer(part: Path, tokenizer: Any) -> None:
    """Writes a tokenizer that every version of transformers reads."""
    tokenizer.save_pretrained(part)
    file = part / "tokenizer_config.json"
    write_json(file, tokenizer_settings(json.loads(file.read_text())))
