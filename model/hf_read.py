"""Reads folders in Hugging Face format as data: nobody is asked, nothing is downloaded.

Their code does not run, but for `load_export` when it is told to.

Whatever a library raises about a file of theirs becomes a `ValueError` that names the folder in one line.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from common.console import count_text
from common.json_files import read_json_object
from common.paths import check_plain
from common.pickles import tell
from model.hf.configuration_saisa import SaisaConfig
from model.hf.image_processing_saisa import SaisaImageProcessor
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor

DATA_ONLY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Options of every `from_pretrained`. Without the first it asks whether to run a folder's code."""
WAY_OUT = "download or write it again"
CODE = Path(__file__).parent / "hf"
NOT_READ = ("special_tokens_map_file", "tokenizer_config_file")
"""Settings of a tokenizer that name files which transformers takes from the folder all the same."""
LARGEST = {"num_hidden_layers": 1000, "": 10_000_000}  # of the whole numbers in a configuration


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
        ValueError: It is damaged, or of something else.
    """
    raw = read_json_object(folder / "config.json", WAY_OUT)
    check_sizes(folder, raw)
    with named(folder / "config.json"):
        return SaisaConfig.from_pretrained(folder, **DATA_ONLY)


def check_sizes(folder: Path, raw: dict[str, Any]) -> None:
    """Refuses a configuration that would take all memory before its weights are compared with it.

    Raises:
        ValueError: A number in it is no size of a model.
    """
    for section in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name, value in section.items():
            is_size = name.startswith(("num_", "max_position")) or name.endswith("_size")
            if is_size and value is not None and not _is_size(value, LARGEST.get(name, LARGEST[""])):
                raise ValueError(f"{folder / 'config.json'}: {name}={str(value)[:40]} is no size of a model; {WAY_OUT}")


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
    """Refuses a tokenizer whose settings name other files: transformers would read those instead of the folder's.

    Raises:
        ValueError: They do.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file, WAY_OUT) if file.is_file() else {}
    for name, value in settings.items():
        is_path = name == "vocab" or name.endswith(("_file", "_spm"))  # of all tokenizers in transformers
        if is_path and name not in NOT_READ and isinstance(value, str):
            raise ValueError(f"{file}: {name}={value!r} names a file; remove it from there")
    if settings.get("init_inputs"):  # the same without names
        raise ValueError(f"{file}: init_inputs={settings['init_inputs']!r} may name files; remove it from there")


def load_image_processor(folder: Path, **options: Any) -> SaisaImageProcessor:
    """Returns the image processor of a base or an export.

    Raises:
        ValueError: It is damaged.
    """
    with named(folder):
        return SaisaImageProcessor.from_pretrained(folder, **DATA_ONLY, **options)


def load_processor(folder: Path, **options: Any) -> SaisaProcessor:
    """Returns the processor of an export.

    Raises:
        ValueError: It is damaged, or needs code of its own.
    """
    check_tokenizer(folder)
    with named(folder):
        return SaisaProcessor.from_pretrained(folder, **DATA_ONLY, **options)


def load_model(folder: Path, **options: Any) -> SaisaForConditionalGeneration:
    """Returns the model of an export, with the code of this repository.

    Raises:
        ValueError: Its configuration or weights are damaged, or its code is another than this repository's.
    """
    config = load_config(folder)
    if (index := folder / "model.safetensors.index.json").is_file():
        files_in_index(index)  # transformers would follow a path out of the folder
    if (generation := folder / "generation_config.json").is_file():
        read_json_object(generation, WAY_OUT)  # transformers would go on without one that is damaged
    with named(folder):
        return SaisaForConditionalGeneration.from_pretrained(
            folder, config=config, use_safetensors=True, **DATA_ONLY, **options
        )


def load_export(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Returns the processor and the model of an export, with the code of this repository or of the folder.

    Raises:
        ValueError: The folder is damaged, or was written by another version and is not trusted.
    """
    if not trust_remote_code:
        check_code(folder)
        processor, model = load_processor(folder), load_model(folder, dtype="auto").eval()
        check_processor(folder, processor, model.config)
        return processor, model
    trusted: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    with named(folder):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **trusted)
        return AutoProcessor.from_pretrained(folder, **trusted), model.eval()


def check_processor(folder: Path, processor: SaisaProcessor, config: SaisaConfig) -> None:
    """Makes sure that a processor writes prompts, and as many placeholders as the model has visual tokens.

    Raises:
        ValueError: It does not.
    """
    if processor.num_image_tokens != config.num_image_tokens:
        raise ValueError(
            f"{folder / 'processor_config.json'}: num_image_tokens={processor.num_image_tokens!r}, but the model has "
            f"{count_text(config.num_image_tokens, 'visual token')} an image; {WAY_OUT}"
        )
    if processor.chat_template is not None:
        with named(folder / "chat_template.jinja"):
            processor.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)


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
