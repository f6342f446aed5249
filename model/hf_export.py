"""Reads exports: a processor and a model that answer, of a folder that may be anybody's.

What they are loaded with is checked first. Of the folder's settings those count that say what the model is; how our
commands ask it is theirs to say, so neither its Python files nor a chat template of its own run without trust.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from common.console import count_text
from common.json_files import read_json_object
from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_folder import weight_shapes
from model.hf_read import DATA_ONLY, WAY_OUT, check_image_size, check_tokenizer, files_in_index, load_config, named

CODE = Path(__file__).parent / "hf"


def load_processor(folder: Path, **options: Any) -> SaisaProcessor:
    """Returns the processor of an export.

    Raises:
        ValueError: It is damaged, or needs code of its own.
    """
    check_tokenizer(folder)
    if (file := folder / "processor_config.json").is_file() and "audio_tokenizer" in read_json_object(file, WAY_OUT):
        raise ValueError(f"{file}: audio_tokenizer names another folder; remove it from there")
    load_config(folder)  # refuses what transformers 5 would take for the tokenizer's sake
    with named(folder):
        return SaisaProcessor.from_pretrained(folder, **DATA_ONLY, **options)


def load_model(folder: Path, **options: Any) -> SaisaForConditionalGeneration:
    """Returns the model of an export, with the code of this repository.

    Raises:
        ValueError: Its configuration or weights are damaged, or its code is another than this repository's.
    """
    config = load_config(folder)
    with named(folder / "config.json"):
        shapes = weight_shapes(config, is_base=False)
    check_weights(folder, shapes)
    options["generation_config"] = generation_settings(folder, config)
    with named(folder):
        return SaisaForConditionalGeneration.from_pretrained(
            folder, config=config, use_safetensors=True, **DATA_ONLY, **options
        )


def check_weights(folder: Path, expected: Mapping[str, torch.Size]) -> None:
    """Makes sure, by their headers, that the weight files hold what a model has: no more, no less, no other shapes.

    Raises:
        ValueError: They do not.
    """
    index, missing = folder / "model.safetensors.index.json", dict(expected)
    for name in files_in_index(index) if index.is_file() else ["model.safetensors"]:
        with named(folder / name), safe_open(folder / name, framework="pt") as tensors:
            for weight in tensors.keys():  # noqa: SIM118
                shape = torch.Size(tensors.get_slice(weight).get_shape())
                if missing.pop(weight, None) != shape:
                    told = f"of shape {list(expected[weight])}" if weight in expected else "not there"
                    raise ValueError(f"it holds {weight} of shape {list(shape)}, by config.json it is {told}")
    if missing:
        raise ValueError(f"{folder} lacks {count_text(len(missing), 'weight')}, such as {min(missing)}; {WAY_OUT}")


def generation_settings(folder: Path, config: Any) -> GenerationConfig:
    """Returns how a model generates where a command does not say: as transformers does by itself.

    The folder decides at which ids answers end and what fills rows up. All else in its generation_config.json, such as
    beams or penalties, would change what a command does without its user having asked.

    Raises:
        ValueError: The file is damaged, or an id in it is none of the model's.
    """
    file = folder / "generation_config.json"
    told = read_json_object(file, WAY_OUT) if file.is_file() else {}
    ids: dict[str, Any] = {}
    for name in ("eos_token_id", "pad_token_id"):
        value = ids[name] = told.get(name, getattr(config, name, None))
        listed = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(each) is int and 0 <= each < config.vocab_size for each in listed):
            raise ValueError(f"{file}: {name}={str(value)[:40]} must name ids below {config.vocab_size}; {WAY_OUT}")
    return GenerationConfig(**ids)


def load_export(folder: Path, templates: Collection[str], trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Returns the processor and the model of an export, with the code of this repository or of the folder.

    Args:
        folder: Written by `make export`.
        templates: The chat templates that may run without trust: one from somebody else may never end, or take all
            memory.
        trust_remote_code: Run the Python files and the chat template in the folder.

    Raises:
        ValueError: The folder is damaged, or was written by another version and is not trusted.
    """
    if trust_remote_code:
        trusted: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        with named(folder):
            config = AutoConfig.from_pretrained(folder, **trusted)
            settings = {"config": config, "generation_config": generation_settings(folder, config)}
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **settings, **trusted)
            processor = AutoProcessor.from_pretrained(folder, **trusted)
    else:
        check_code(folder)
        processor = load_processor(folder)
        check_template(folder, processor.chat_template, templates)
        model = load_model(folder, dtype="auto")
        check_processor(folder, processor, model.config)
    if not processor.chat_template:
        raise ValueError(f"{folder}: no chat_template.jinja, so nobody knows how to ask this model; export it again")
    return processor, model.eval()


def check_template(folder: Path, template: Any, templates: Collection[str]) -> None:
    """Makes sure that a chat template, if there is one, is one of those that may run.

    Raises:
        ValueError: It is another.
    """
    if template and template not in templates:
        raise ValueError(
            f"{folder / 'chat_template.jinja'} is none of the templates of this version; export the folder again, or "
            "pass --trust-remote-code to run it and the Python files in the folder"
        )


def check_processor(folder: Path, processor: SaisaProcessor, config: SaisaConfig) -> None:
    """Makes sure that a processor makes as many placeholders, and images of the size, that the model takes.

    Raises:
        ValueError: It does not.
    """
    check_image_size(folder, processor.image_processor, config.vision_config.image_size)
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{folder}: config.json says image_token_id={config.image_token_id}, but the tokenizer's is "
            f"{processor.image_token_id}; {WAY_OUT}"
        )
    if type(processor.num_image_tokens) is not int or processor.num_image_tokens != config.num_image_tokens:
        raise ValueError(
            f"{folder / 'processor_config.json'}: num_image_tokens={processor.num_image_tokens!r}, but the model has "
            f"{count_text(config.num_image_tokens, 'visual token')} an image; {WAY_OUT}"
        )


def check_code(folder: Path) -> None:
    """Makes sure that an export was written by this version: its Python files, which are not run, are the same.

    Raises:
        ValueError: They are not.
    """
    for file in sorted(folder.glob("*.py")):
        ours = CODE / file.name
        if not ours.is_file() or ours.read_bytes() != file.read_bytes():
            raise ValueError(
                f"{folder} was written by another version of this project: {file.name} differs; export it again with "
                "this version, or pass --trust-remote-code to run the Python files in the folder"
            )
