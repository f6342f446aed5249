"""A conversation with an exported model, as `make chat` has it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.console import UsageError, count_text
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from model.hf_check import check_export
from model.hf_export import load_export
from pipeline.data.templates import chat_templates

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
            raise ValueError(
                f"the conversation has {count_text(length, 'position')}, the model takes {limit}; start again"
            )
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0, "temperature": self.temperature or None}
        ids = self.model.generate(**inputs, **sampling, max_new_tokens=min(self.max_new_tokens, limit - length))
        answer = self.processor.decode(ids[0, length:], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer


def load_chat(
    folder: Path,
    image: Image.Image | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Chat:
    """Returns a chat with the checkpoint in a folder, on a GPU if there is one.

    Raises:
        ValueError: the folder holds no export of ours.
    """
    check_export(folder)
    target = _device(device)
    processor, model = load_export(folder, chat_templates(), trust_remote_code)
    return Chat(model.to(target), processor, image, **options)


def _device(name: str | None) -> torch.device:
    """Returns the named device, or a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
