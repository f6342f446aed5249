"""Talks to an exported checkpoint.

python -m pipeline.evaluation.chat --model exports/saisa-7b --image cat.jpg --question "What is on the sofa?"
python -m pipeline.evaluation.chat --model exports/saisa-7b --image cat.jpg        asks on, until an empty line
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from typer import Option

from common.console import UsageError, plain, run
from common.images import ImageError, load_image
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_folder import check_export
from model.hf_read import load_export

Message = dict[str, Any]


@dataclass
class Chat:
    """A loaded checkpoint, an image (or none), and what was said about it."""

    model: SaisaForConditionalGeneration
    processor: SaisaProcessor
    image: Image.Image | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)

    def ask(self, question: str) -> str:
        """Returns the answer, and remembers both. The first question is asked about the image.

        Raises:
            ValueError: the conversation has become longer than the model's positions.
        """
        content: list[Message] = [{"type": "text", "text": question}]
        if self.image is not None and not self.messages:
            content = [{"type": "image"}, *content]
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=self.image, return_tensors="pt").to(self.model.device)
        length, limit = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length >= limit:
            raise ValueError(f"the conversation has {length} positions, the model takes {limit}; start again")
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0, "temperature": self.temperature or None}
        ids = self.model.generate(**inputs, **sampling, max_new_tokens=min(self.max_new_tokens, limit - length))
        answer = self.processor.decode(ids[0, length:], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


def load_chat(
    folder: Path, image: Path | None = None, device: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Chat:
    """Returns a chat with the checkpoint in a folder, on a GPU if there is one.

    Raises:
        ValueError: the folder holds no export of ours, or the image does not open.
    """
    check_export(folder)
    target = _device(device)
    picture = None if image is None else open_image(image)
    processor, model = load_export(folder, trust_remote_code)
    if processor.chat_template is None:
        raise ValueError(f"{folder}: no chat_template.jinja, so nobody knows how to ask this model; export it again")
    return Chat(model.to(target), processor, picture, **options)


def open_image(file: Path) -> Image.Image:
    """Returns an image, decoded.

    Raises:
        ValueError: the file is not there, or not an image that Pillow reads.
    """
    try:
        return load_image(file.read_bytes())
    except (OSError, ImageError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable image ({error})"
        raise ValueError(f"{file}: {reason}") from None


def _device(name: str | None) -> torch.device:
    """Returns the named device, or a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


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
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    chat = load_chat(model, image, device, trust_remote_code, **options)
    for asked in [question.strip()] if question is not None else _questions():
        print(plain(chat.ask(asked)), flush=True)


if __name__ == "__main__":
    run(main)
