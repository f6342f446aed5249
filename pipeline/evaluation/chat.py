"""Talks to an exported checkpoint.

python -m pipeline.evaluation.chat --model exports/saisa-7b --image cat.jpg --question "What is on the sofa?"
python -m pipeline.evaluation.chat --model exports/saisa-7b --image cat.jpg        asks on, until an empty line
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from typer import Option

from common.console import UsageError, plain, run
from common.files import read_whole
from common.images import MAX_IMAGE_BYTES, load_image
from model.hf_check import check_export


def open_image(file: Path) -> Image.Image:
    """Returns an image, decoded.

    Raises:
        ValueError: the file is not there, or not an image that Pillow reads.
    """
    try:
        return load_image(read_whole(file, MAX_IMAGE_BYTES))
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable image ({error})"
        raise ValueError(f"{file}: {reason}") from None


def _questions() -> Iterator[str]:
    """Yields what is typed, until an empty line or the end of the input."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def main(
    model: Annotated[Path, Option(help="exported folder")],
    image: Annotated[Path | None, Option(help="image to talk about; none for text only")] = None,
    question: Annotated[str | None, Option(help="ask once and end; without it, ask on")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[float, Option(min=0.0, help="0 answers the same every time")] = 0.0,
    device: Annotated[str | None, Option(help="cpu, cuda, ...; default: a GPU if there is one")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="run the Python files in the exported folder")
    ] = False,
) -> None:
    """Prints the model's answer."""
    if question is not None and not question.strip():
        raise UsageError("--question is empty; leave it out to ask interactively")
    check_export(model)
    picture = None if image is None else open_image(image)
    from pipeline.evaluation.conversation import load_chat  # takes seconds: not before there is something to talk to

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    chat = load_chat(model, picture, device, trust_remote_code, **options)
    for asked in [question.strip()] if question is not None else _questions():
        print(plain(chat.ask(asked)), flush=True)


if __name__ == "__main__":
    run(main)
