"""What a downloaded checkpoint says about itself, and its tensors.

Language models of the Llama family (Llama, Vicuna, Llama-3, Mistral, Qwen2) and CLIP or SigLIP encoders, as safetensors
or as older `pytorch_model*.bin`. What a SAISA model could not represent exactly is refused: rope scaling, a sliding
window that matters, quantised weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import Metaspace
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from common.files import read_whole
from common.json_files import read_json_object
from model import hf_read
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf_read import (
    VISION_FIELDS,
    WAY_OUT,
    check_files,
    check_image_size,
    check_sizes,
    files_in_index,
    named,
    read_safetensors_file,
)

LLMS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
VISIONS = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
MAX_TEMPLATE_BYTES = 1 << 20
WEIGHT_FILES = (
    ("model", "safetensors"),
    ("pytorch_model", "bin"),
    ("open_clip_model", "safetensors"),
    ("open_clip_pytorch_model", "bin"),
)
Named = tuple[str, Tensor]


def llm_fields(folder: Path, raw: dict[str, Any], max_positions: int | None) -> dict[str, Any]:
    """Returns the language model's part of a `SaisaConfig`, from its `config.json`.

    Raises:
        ValueError: it has something that a SAISA model cannot represent.
    """
    if str(raw.get("model_type")) not in LLMS:
        raise ValueError(
            f"{folder}: model_type={raw.get('model_type')!r} is not supported; use one of {', '.join(LLMS)}"
        )
    if raw.get("quantization_config"):
        raise ValueError(f"{folder}: the checkpoint is quantised; use the original weights")
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # of transformers 4, of 5
        rope = raw.get(name) or rope
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"{folder}: rope scaling {kind!r} is not supported; use a model without it")
    check_sizes(folder, raw)
    llm = LLMS[raw["model_type"]].from_dict(raw)
    for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if getattr(llm, name, only) != only:
            raise ValueError(f"{folder}: {name}={getattr(llm, name)!r} is not supported, only {only!r}")
    theta = llm.rope_theta if hasattr(llm, "rope_theta") else llm.rope_parameters["rope_theta"]  # transformers 4 or 5
    positions = max_positions or llm.max_position_embeddings
    if positions > llm.max_position_embeddings:
        raise ValueError(f"{folder}: max_positions={positions} is beyond the model's {llm.max_position_embeddings}")
    window = llm.sliding_window if getattr(llm, "use_sliding_window", True) and hasattr(llm, "sliding_window") else None
    if window is not None and window < positions:
        raise ValueError(
            f"{folder}: sliding_window={window} is shorter than max_position_embeddings={positions}, and SAISA attends "
            f"to everything; pass --max-positions {window} (or less), where both are the same"
        )
    return {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "head_dim": getattr(llm, "head_dim", None),
        "max_position_embeddings": positions,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": float(rope.get("rope_theta", theta)),
        "attention_bias": raw["model_type"] == "qwen2",
        "tie_word_embeddings": llm.tie_word_embeddings,
        "bos_token_id": llm.bos_token_id,
        "eos_token_id": _end_ids(folder, llm.eos_token_id),
    }


def vision_fields(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a `vision_config` from what a folder says of an encoder, alone or with its text tower.

    Raises:
        ValueError: it is neither CLIP nor SigLIP.
    """
    if str(raw.get("model_type")) not in VISIONS:
        raise ValueError(
            f"{folder}: model_type={raw.get('model_type')!r} is not supported; use a CLIP or SigLIP encoder"
        )
    if raw.get("quantization_config"):
        raise ValueError(f"{folder}: the checkpoint is quantised; use the original weights")
    check_sizes(folder, raw)
    config = VISIONS[raw["model_type"]].from_dict(raw.get("vision_config", raw))
    fields = {name: getattr(config, name) for name in VISION_FIELDS if hasattr(config, name)}
    return fields


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Returns a folder's tokenizer, with a padding token, such that every version of transformers gives the same ids.

    They are those of the slow tokenizer where the folder has its `tokenizer.model`: LLaVA uses that one.

    transformers 5 builds the tokenizer of a `LlamaTokenizer` folder anew from its vocabulary and settings, 4.57 takes
    `tokenizer.json` as it stands, and they differ in where a text gets a space in front (with `legacy=True` or
    `add_prefix_space=None`). The plain class reads `tokenizer.json` in both.

    Raises:
        ValueError: there is none, or it has neither a padding token nor EOS to pad with.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise ValueError(f"{folder}: no tokenizer files; download the whole repository of the language model")
    # transformers 4.57.3 to 4.57.6 take a vocabulary of more than 100,000 tokens for Mistral's and advise to change it.
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    options = {} if "mistral" in config.get("model_type", "") else {"fix_mistral_regex": False}
    found = hf_read.load_tokenizer(folder, **options)
    if not found.is_fast:
        raise ValueError(f"{folder}: {type(found).__name__} has no fast form, which the exported folder needs")
    if (folder / "tokenizer.model").is_file():
        prepend_like_sentencepiece(found.backend_tokenizer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        model_max_length=found.model_max_length,
        clean_up_tokenization_spaces=found.clean_up_tokenization_spaces,
        model_input_names=["input_ids", "attention_mask"],
        **found.special_tokens_map,
    )
    end_like_generation(tokenizer, _end_ids(folder, None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: the tokenizer has no padding token and no EOS; set its eos_token")
    return tokenizer


def end_like_generation(tokenizer: PreTrainedTokenizerFast, end_ids: int | list[int] | None) -> None:
    """Lets a tokenizer whose EOS is no token at which its model stops end with the first that is."""
    ids = end_ids if isinstance(end_ids, list) else [end_ids]
    names = [tokenizer.convert_ids_to_tokens(each) for each in ids if each is not None]
    if names and tokenizer.eos_token not in names and isinstance(names[0], str):
        tokenizer.eos_token = names[0]


def own_chat_template(folder: Path) -> str | None:
    """Returns the chat template that a folder brings along, unread, from wherever versions of transformers put it.

    Raises:
        ValueError: a file of the folder is damaged.
    """
    check_files(folder)
    if (file := folder / "chat_template.jinja").is_file():
        return read_whole(file, MAX_TEMPLATE_BYTES).decode()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json_object(folder / name, WAY_OUT).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several by name
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
        if isinstance(found, str):
            return found
    return None


def prepend_like_sentencepiece(tokenizer: Tokenizer) -> None:
    """Lets a converted tokenizer (`legacy=False`) put a space before a text that begins with a space, too.

    Sentencepiece does, and the slow tokenizer. `Metaspace` leaves out a space that is there already; here the first of
    two puts one before all other text, since the spaces of the text have become another letter by then:

        " a"  ->  "_a"  ->  " _a"  ->  "__a"
    """
    before = tokenizer.pre_tokenizer
    if tokenizer.normalizer is None and isinstance(before, Metaspace) and before.prepend_scheme == "first":
        tokenizer.normalizer = normalizers.Replace(" ", before.replacement)
        once, rest = (
            Metaspace(letter, scheme, False) for letter, scheme in ((" ", "first"), (before.replacement, "never"))
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([once, rest])


def load_image_processor(folder: Path, image_aspect_ratio: str, image_size: int) -> SaisaImageProcessor:
    """Returns the encoder's image processing, resizing to a square straight away or padding to one first (`pad`).

    Raises:
        ValueError: the folder does not say how, or makes images of another size than the encoder takes.
    """
    settings = image_settings(folder)
    with named(folder / "preprocessor_config.json"):
        processor = SaisaImageProcessor.from_encoder(settings, image_aspect_ratio)
    check_image_size(folder, processor, image_size)
    return processor


def image_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a folder's image processor; transformers 5 writes them inside those of the processor.

    Raises:
        ValueError: there are none.
    """
    whole = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and whole.is_file():
        inside = read_json(whole).get("image_processor")
        if isinstance(inside, dict):
            return inside
    return read_json(folder / "preprocessor_config.json")


def read_checkpoint(folder: Path) -> Iterator[Named]:
    """Yields the tensors of a Hugging Face checkpoint, file by file; safetensors where there are both kinds.

    Raises:
        ValueError: there are no weights, or files that the index names are missing.
    """
    for file in weight_files(folder):
        yield from read_safetensors_file(file) if file.suffix == ".safetensors" else _read_bin(file)


def weight_names(folder: Path) -> set[str]:
    """Returns the names of a checkpoint's tensors.

    Raises:
        ValueError: as `read_checkpoint` does.
    """
    names: set[str] = set()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with named(file), safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        else:
            names.update(name for name, _ in _read_bin(file))
    return names


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint's weights.

    Raises:
        ValueError: there are none, or files that the index names are missing.
    """
    for stem, suffix in WEIGHT_FILES:
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if not index.is_file() and not single.is_file():
            continue
        names = files_in_index(index) if index.is_file() else [single.name]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: the index names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    raise ValueError(f"{folder}: no model.safetensors, pytorch_model.bin or index of shards")


def _read_bin(file: Path) -> list[Named]:
    with named(file):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, which cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("it does not hold tensors by name")
        return list(found.items())


def _end_ids(folder: Path, configured: int | list[int] | None) -> int | list[int] | None:
    """Returns the ids at which the language model stops: its generation configuration knows more than its own."""
    if not (folder / "generation_config.json").is_file():
        return configured
    with named(folder / "generation_config.json"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id or configured


def read_json(file: Path) -> dict[str, Any]:
    """Returns the content of one of a checkpoint's JSON files.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    check_files(file.parent)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; {file.parent} must be a checkpoint folder in Hugging Face format")
    return read_json_object(file, WAY_OUT)
