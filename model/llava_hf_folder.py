"""Writes a model of architecture `llava` for transformers' own `LlavaForConditionalGeneration`: FORMAT=llava-hf.

Neither the folder nor who loads it needs code of ours. Weights have the names that the first files of llava-hf gave
them, which all versions of transformers read. `model.llava_source` reads the folder again.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import cat

from common.files import named_errors
from model.hf.configuration_saisa import OLDEST_TRANSFORMERS, SaisaConfig
from model.hf.processing_saisa import IMAGE_TOKEN
from model.hf_folder import add_image_row, ending_at, generation_config, weight_shapes
from model.hf_shards import EMBEDDING, HEAD, whole_folder, write_json, write_weights
from model.hf_source import Named
from model.llava_folder import (
    LANGUAGE_MODEL_FIELDS,
    TOWER,
    check_llava,
    image_settings,
    vision_settings,
    write_tokenizer,
)
from model.llava_source import select_strategy

LLAVA_HF_NAMES = {
    HEAD: "language_model.lm_head.weight",
    TOWER: "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
}
"""From how our names begin to how theirs do; the first that fits."""
SPACE_BEHIND_IMAGES = """
{%- for piece in prompt.split('<image>') -%}
  {%- if not loop.first -%}{{- '<image>' + (' ' if piece else '') -}}{%- endif -%}
  {{- piece -}}
{%- endfor -%}
"""


def write_llava_hf(
    folder: Path,
    config: SaisaConfig,
    tensors: Iterable[Named],
    tokenizer: Any,
    image_processor: Any,
    chat_template: str | None = None,
    *,
    stop_token: str | None = None,
) -> None:
    """Writes a folder for transformers' own classes; arguments and errors are those of `write_hf_folder`."""
    check_llava(config, "llava-hf")
    config, tensors = add_image_row(config, tensors)
    shapes = {llava_hf_name(name): shape for name, shape in weight_shapes(config, is_base=False).items()}
    with whole_folder(folder) as part:
        dtype = write_weights(part, shapes, _llava_hf_tensors(config, tensors), None)
        with named_errors(part):
            settings = llava_hf_config(config) | {"dtype": str(dtype).removeprefix("torch.")}
            write_json(part / "config.json", settings)
            generation_config(config, tokenizer, stop_token).save_pretrained(part)
            write_tokenizer(part, ending_at(tokenizer, stop_token))
            write_json(part / "preprocessor_config.json", image_settings(config, image_processor, "LlavaProcessor"))
            is_clip = settings["vision_feature_select_strategy"] == "default"
            processor = {
                "processor_class": "LlavaProcessor",
                "image_token": IMAGE_TOKEN,
                "patch_size": config.vision_config.patch_size,
                "vision_feature_select_strategy": settings["vision_feature_select_strategy"],
                "num_additional_image_tokens": int(is_clip),  # the class token, which "default" takes away again
            }
            write_json(part / "processor_config.json", processor)
            if chat_template is not None:
                (part / "chat_template.jinja").write_text(spaced(chat_template, tokenizer))


def spaced(chat_template: str, tokenizer: Any) -> str:
    """Returns a chat template whose prompts have the ids of training when a tokenizer reads `<image>` as its token.

    Training tokenises what follows an image on its own, where some tokenizers open a text with a space that they do not
    write in the midst of one; for those the template writes it.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    image, text = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), "\nWhat?"
    expected = [image, *ids(text)]
    is_needed = ids(IMAGE_TOKEN + text) != expected and ids(f"{IMAGE_TOKEN} {text}") == expected
    return f"{{%- set prompt -%}}{chat_template}{{%- endset -%}}{SPACE_BEHIND_IMAGES}" if is_needed else chat_template


def llava_hf_name(name: str) -> str:
    """Returns the name of one of our weights in llava-hf's files."""
    ours, theirs = next(pair for pair in LLAVA_HF_NAMES.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def _llava_hf_tensors(config: SaisaConfig, tensors: Iterable[Named]) -> Iterator[Named]:
    """Yields weights under llava-hf's names.

    Theirs may say the image token. Where an export added its row, what says it becomes the mean of all other rows:
    its logit is the mean of the others, so never the largest.
    """
    says = EMBEDDING if config.tie_word_embeddings else HEAD
    num_rows = config.vocab_size - config.num_image_rows
    for name, tensor in tensors:
        if name == says and config.num_image_rows:
            mean = tensor[:num_rows].float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = cat([tensor[:num_rows], mean.expand(config.num_image_rows, -1)])
        yield llava_hf_name(name), tensor


def llava_hf_config(config: SaisaConfig) -> dict[str, Any]:
    """Returns the config.json of llava-hf's layout."""
    text: dict[str, Any] = {name: getattr(config, name) for name in LANGUAGE_MODEL_FIELDS}
    text |= {"model_type": "qwen2" if config.attention_bias else "llama", "hidden_act": "silu"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision_settings(config),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_select_layer,
        "vision_feature_select_strategy": select_strategy(config.vision_config.model_type),
        "tie_word_embeddings": config.tie_word_embeddings,
        "transformers_version": OLDEST_TRANSFORMERS,
    }
