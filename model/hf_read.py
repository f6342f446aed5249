"""Reads folders in Hugging Face format as data: nobody is asked, nothing is downloaded.

Whatever a library raises about a file of theirs becomes a `ValueError` that names the folder in one line.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from common.json_files import read_json_object
from common.paths import check_plain, check_regular
from common.pickles import tell
from model.config import model_config_from_hf
from model.hf.configuration_saisa import SaisaConfig
from model.hf.image_processing_saisa import MAX_SIDE, SaisaImageProcessor
from model.hf.timm_saisa import PLAIN_NAME

DATA_ONLY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Options of every `from_pretrained`. Without the first it asks whether to run a folder's code."""
WAY_OUT = "download or write it again"
NOT_READ = ("special_tokens_map_file", "tokenizer_config_file")
"""Settings of a tokenizer that name files which transformers takes from the folder all the same."""
LARGEST = {
    "num_hidden_layers": 1000,
    "num_labels": 1000,
    "resampler_tokens": 100_000,
    "image_size": MAX_SIDE,
    "": 10_000_000,
}
"""Of the whole numbers in a configuration."""
FIELDS = (*signature(SaisaConfig).parameters, "dtype", "torch_dtype")
"""What is read of a configuration; transformers would build other things from the rest."""
VISION_FIELDS = (
    "model_type",
    "architecture",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "vision_use_head",
)
MAX_GROWTH = 100
MAX_JSON_BYTES = 256 << 20  # the largest tokenizers have some 40 MB
KERNELS = (None, "sdpa", "eager")  # transformers would fetch others from the Hub


@contextmanager
def named(what: Path, way_out: str = WAY_OUT) -> Iterator[None]:
    """Makes one line of whatever is raised about a file or folder.

    Raises:
        ValueError: Names it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BaseException as error:  # tokenizers in Rust raise plain Exception, and panic with a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = tell(error)
        if isinstance(error, ValueError) and str(error).startswith(str(what)) and "\n" not in str(error):
            raise
        raise ValueError(f"{what} cannot be read ({text}); {way_out}") from error


def load_config(folder: Path) -> SaisaConfig:
    """Returns the configuration of a base or an export.

    Raises:
        ValueError: It is damaged, of something else, or asks for code that is not this repository's.
    """
    check_files(folder)
    raw = read_json_object(file := folder / "config.json", WAY_OUT)
    check_sizes(folder, raw)
    for name, value in (item for section in _sections(raw) for item in section.items()):
        if (name == "quantization_config" and value) or (name.endswith("attn_implementation") and value not in KERNELS):
            raise ValueError(f"{file}: {name}={str(value)[:40]!r} asks for code of others; remove it from there")
    with named(file):
        vision = raw.get("vision_config")
        if isinstance(vision, dict):
            raw = raw | {"vision_config": {name: vision[name] for name in VISION_FIELDS if name in vision}}
        fields: dict[str, Any] = {name: raw[name] for name in FIELDS if name in raw}
        config = SaisaConfig(**fields)
        check_model(config)
        return config


def check_files(folder: Path) -> None:
    """Refuses a folder with a file that nobody should read to its end: libraries would.

    Raises:
        ValueError: There is a pipe, a device or an enormous JSON file.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        check_regular(file)
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{file} has more than {MAX_JSON_BYTES:,} bytes, as no such file needs; {WAY_OUT}")
        if file.name == "tokenizer.model" and not file.stat().st_size:  # transformers 5 makes an empty vocabulary of it
            raise ValueError(f"{file} is empty; {WAY_OUT}")


def check_model(config: SaisaConfig) -> None:
    """Refuses what no model can be built from.

    Raises:
        ValueError: A setting is of a wrong type, or they contradict each other.
    """
    vision = config.vision_config
    try:
        model_config_from_hf(config)
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}={str(first['input'])[:40]}: " if first["loc"] else ""
        raise ValueError(f"{told}{first['msg']}") from error
    checked = [("initializer_range", config.initializer_range)]
    if vision.model_type == "timm_grid":
        if not PLAIN_NAME.fullmatch(str(vision.architecture)):
            raise ValueError(f"architecture={str(vision.architecture)[:40]!r} is no name of timm's")
    elif vision.num_attention_heads < 1 or vision.hidden_size % vision.num_attention_heads:
        raise ValueError(f"{vision.num_attention_heads} heads must divide hidden_size={vision.hidden_size}")
    else:
        checked.append(("layer_norm_eps", vision.layer_norm_eps))
    for name, value in checked:
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{name}={str(value)[:40]} must be a positive number")
    if type(config.image_token_id) is not int or config.image_token_id < 0:
        raise ValueError(f"image_token_id={str(config.image_token_id)[:40]} must be an id")


def check_sizes(folder: Path, raw: dict[str, Any]) -> None:
    """Refuses a configuration that would take all memory before its weights are compared with it.

    Raises:
        ValueError: A number in it is no size of a model.
    """
    for section in _sections(raw):
        for name, value in section.items():
            is_size = name.startswith(("num_", "max_position")) or name.endswith("_size") or name == "resampler_tokens"
            if is_size and value is not None and not _is_size(value, LARGEST.get(name, LARGEST[""])):
                raise ValueError(f"{folder / 'config.json'}: {name}={str(value)[:40]} is no size of a model; {WAY_OUT}")


def _sections(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield raw
    yield from (value for value in raw.values() if isinstance(value, dict))


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and 0 <= value <= largest


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """Returns the tokenizer in a folder, whose files alone it reads.

    Raises:
        ValueError: It is damaged, needs code of its own, or names files elsewhere.
    """
    check_tokenizer(folder)
    with named(folder, "its tokenizer files are damaged or need code of their own; use a tokenizer that does not"):
        return AutoTokenizer.from_pretrained(folder, **DATA_ONLY, **options)


def check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer whose settings name other files (transformers would read those), or that `check_growth` does.

    Raises:
        ValueError: They do.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    check_files(folder)
    check_growth(folder / "tokenizer.json")
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file, WAY_OUT) if file.is_file() else {}
    for name, value in settings.items():
        is_path = name == "vocab" or name.endswith(("_file", "_spm"))  # of all tokenizers in transformers
        if is_path and name not in NOT_READ and isinstance(value, str):
            raise ValueError(f"{file}: {name}={value!r} names a file; remove it from there")
    if not isinstance(longest := settings.get("model_max_length", 0), int | float | None):
        raise ValueError(f"{file}: model_max_length={str(longest)[:40]!r} must be a number; {WAY_OUT}")
    if not isinstance(settings.get("model_input_names", []), list):
        raise ValueError(f"{file}: model_input_names must be a list of names; {WAY_OUT}")
    if settings.get("init_inputs"):  # the same without names
        raise ValueError(f"{file}: init_inputs={settings['init_inputs']!r} may name files; remove it from there")


def check_growth(file: Path) -> None:
    """Refuses a tokenizer that makes much of a short text: where its library finds no memory, it ends the process.

    Raises:
        ValueError: Its replacements multiply to, or it adds to every text, more than `MAX_GROWTH`.
    """
    content = read_json_object(file, WAY_OUT) if file.is_file() else {}
    with named(file):
        largest = max(_growth(content.get("normalizer")), _growth(content.get("decoder")))
        largest = max(largest, _num_added(content.get("post_processor")))
        if largest > MAX_GROWTH:
            raise ValueError(f"one character or text may become {largest:.3g}, and {MAX_GROWTH} are the most")


def _growth(step: Any) -> float:
    """Returns how many characters a step of a tokenizer may make of one."""
    if not isinstance(step, dict):
        return 1
    inner = prod(max(1, _growth(each)) for name in ("normalizers", "decoders") for each in step.get(name) or [])
    if step.get("type") != "Replace":
        return inner
    replaced = len(step["pattern"].get("String", ""))  # an expression may match nothing, between any two characters
    return inner * (len(step["content"]) / replaced if replaced else 1 + len(step["content"]))


def _num_added(step: Any) -> int:
    """Returns at most how many tokens a step of a tokenizer adds to a text."""
    if not isinstance(step, dict):
        return 0
    special = step.get("special_tokens")
    most = max((len(token["ids"]) for token in special.values()), default=0) if isinstance(special, dict) else 0
    places = max(len(step.get("single") or []), len(step.get("pair") or []))
    return places * most + sum(map(_num_added, step.get("processors") or []))


def load_image_processor(folder: Path, **options: Any) -> SaisaImageProcessor:
    """Returns the image processor of a base or an export.

    Raises:
        ValueError: It is damaged, or makes images of another size than the encoder takes.
    """
    with named(folder):
        processor = SaisaImageProcessor.from_pretrained(folder, **DATA_ONLY, **options)
    check_image_size(folder, processor, load_config(folder).vision_config.image_size)
    return processor


def check_image_size(folder: Path, processor: SaisaImageProcessor, image_size: int) -> None:
    """Makes sure that images are of the size that the encoder takes.

    Raises:
        ValueError: They are not.
    """
    if processor.output_size != (image_size, image_size):
        raise ValueError(
            f"{folder}: preprocessor_config.json makes images of {' x '.join(map(str, processor.output_size))} pixels, "
            f"config.json says image_size={image_size}; they must agree"
        )


def read_safetensors_file(file: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields the wanted tensors of a file, or all, one at a time.

    Raises:
        ValueError: The file is cut short or damaged.
    """
    with named(file):
        tensors: Any = safe_open(file, framework="pt")
    with tensors:
        for name in filter(wanted, tensors.keys()):
            with named(file):
                tensor = tensors.get_tensor(name)
            yield name, tensor


def files_in_index(index: Path) -> list[str]:
    """Returns the weight files that an index names, which lie beside it.

    Raises:
        ValueError: The index is damaged, or names a file elsewhere.
    """
    with named(index):
        names = read_json_object(index, WAY_OUT)["weight_map"].values()
        for name in names:
            check_plain(name, index.parent)
        return sorted(set(names))
