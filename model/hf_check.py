"""What is asked of a Hugging Face folder before a framework is imported, so that a wrong name is told at once."""

from pathlib import Path

from common.files import read_whole
from common.json_files import MAX_FILE_BYTES, read_json_object


def check_export(folder: Path) -> None:
    """Makes sure that a folder is an export, before anything large is loaded.

    Raises:
        ValueError: it is something else.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder}: no config.json; --model takes a folder made by `make export`")
    if (kind := read_json_object(config, "export it again").get("model_type")) != "saisa":
        raise ValueError(f"{config}: model_type={kind!r} is not 'saisa'; --model takes a folder made by `make export`")
    if b".mm_projector." not in read_whole(folder / "model.safetensors.index.json", MAX_FILE_BYTES):
        raise ValueError(f"{folder} is a base without projectors; train it, then talk to what `make export` makes")


def check_new_folder(folder: Path) -> None:
    """Makes sure that a folder to write is not there, or empty.

    Raises:
        ValueError: it holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder or remove it")
