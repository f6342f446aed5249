"""An exported model answers questions, a batch at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, TimeRemainingColumn

from common.console import build_console, build_progress, count_text
from common.images import load_image
from data_prep.image_roots import ImageEntry, read_image
from model.hf_export import load_export
from pipeline.data.templates import chat_templates
from pipeline.evaluation.questions import Answer, Question


def answer_questions(
    model_dir: Path,
    questions: Sequence[Question],
    images: Mapping[tuple[int, str], ImageEntry],
    blind: bool,
    batch_size: int,
    max_new_tokens: int,
    trust_remote_code: bool,
) -> tuple[tuple[Answer, ...], tuple[Question, ...]]:
    """Returns an exported model's answers, and the questions too long to be asked.

    Raises:
        ValueError: the folder cannot be read, or every question is too long for its model.
    """
    processor, model = load_export(model_dir, chat_templates(), trust_remote_code)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    limit = model.config.max_position_embeddings
    fits = [len(processor.tokenize(prompt_of(question, processor))) < limit for question in questions]
    too_long = tuple(question for question, fit in zip(questions, fits, strict=True) if not fit)
    if not any(fits):
        raise ValueError(
            f"{model_dir}: every question fills the {count_text(limit, 'position')} of the model; none can be asked"
        )
    asked = [question for question, fit in zip(questions, fits, strict=True) if fit]
    return answer_all(model, processor, asked, images, blind, batch_size, max_new_tokens), too_long


@torch.inference_mode()
def answer_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    images: Mapping[tuple[int, str], ImageEntry],
    blind: bool,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[Answer, ...]:
    """Returns an answer to each question, in their order; batches hold questions of like length, to pad little.

    An answer ends with the model's positions at the latest.
    """
    answers: dict[int, Answer] = {}
    ends, limit = _end_ids(model), model.config.max_position_embeddings
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(questions[i].text)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in progress_of(batches, "asking"):
        asked = [questions[index] for index in batch]
        inputs = batch_inputs(asked, images, processor, blind).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        rooms = (limit - inputs["attention_mask"].sum(1)).tolist()
        for index, row, room in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist(), rooms, strict=True):
            said = row[:room]
            text = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            answers[index] = Answer(questions[index], text, is_cut=not ends & set(said))
    return tuple(answers[index] for index in range(len(questions)))


def batch_inputs(
    questions: Sequence[Question], images: Mapping[tuple[int, str], ImageEntry], processor: Any, blind: bool = False
) -> Any:
    """Returns what a model takes of a batch of questions; every prompt ends at the last position.

    Raises:
        ValueError: An image cannot be read.
    """
    pictures = [[_open(images[question.row, name], question) for name in question.images] for question in questions]
    if blind:
        pictures = [[_blank(picture, processor) for picture in row] for row in pictures]
    return processor(
        text=[prompt_of(question, processor) for question in questions],
        images=pictures if any(pictures) else None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def prompt_of(question: Question, processor: Any) -> str:
    """Returns the text that a model is to answer."""
    return processor.apply_chat_template([{"role": "user", "content": question.prompt}], add_generation_prompt=True)


def _end_ids(model: Any) -> set[int]:
    """Returns the ids at which the model's answers end."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def progress_of[Batch](batches: Sequence[Batch], what: str) -> Iterator[Batch]:
    """Yields the batches, with a progress bar if somebody watches; `what` is done to them."""
    console = build_console(stderr=True)
    columns = ("{task.description}", BarColumn(), TimeRemainingColumn())
    with build_progress(console, *columns, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(batches, description=what)


def _open(entry: ImageEntry, question: Question) -> Image.Image:
    try:
        return load_image(read_image(entry))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{entry.file}: not a readable image ({error}), wanted by record {question.row_id!r}"
        ) from None


def _blank(image: Image.Image, processor: Any) -> Image.Image:
    """Returns an image of the same size in the processor's mean colour, all of which it normalises to about zero."""
    red, green, blue = (round(255 * value) for value in processor.image_processor.image_mean)
    return Image.new("RGB", image.size, (red, green, blue))
