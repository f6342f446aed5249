"""Importing, then talking, through the commands that people type."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from common.console import command
from pipeline.evaluation import chat
from pipeline.evaluation.conversation import load_chat
from tests.hf_compat.make_folder import make_export

QUESTION = "What is the colour of the square?"


def run(main: Any, *arguments: Any, typed: str | None = None) -> Result:
    app = typer.Typer()
    app.command()(command(main))
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random export whose answers are short."""
    folder = tmp_path_factory.mktemp("export")
    make_export(folder / "work", folder / "model", "llama", "clip", "mlp")
    return folder / "model"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images of noise, one larger."""
    folder = tmp_path_factory.mktemp("images")
    for number in (0, 1):
        noise = torch.randint(0, 256, (30, 40 + number, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    return [folder / "0.png", folder / "1.png"]


def test_the_answer_is_what_generate_says(export: Path, images: list[Path]) -> None:
    talk = load_chat(export, chat.open_image(images[0]), "cpu", max_new_tokens=12)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    answer = talk.ask(QUESTION)
    shown = talk.processor.apply_chat_template(talk.messages[:1], add_generation_prompt=True)
    assert shown.endswith(prompt)
    inputs = talk.processor(text=shown, images=Image.open(images[0]), return_tensors="pt")
    ids = talk.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == talk.processor.decode(ids, skip_special_tokens=True).strip()

    talk.ask("And the circle?")
    again = talk.processor.apply_chat_template(talk.messages, add_generation_prompt=False)
    assert again.count("<image>") == 1, "the image belongs to the first question"
    assert again.index(QUESTION) < again.index("And the circle?")


def test_command_prints_the_same_answer_each_time(export: Path, images: list[Path]) -> None:
    arguments = ("--model", export, "--image", images[0], "--max-new-tokens", 8, "--device", "cpu")
    once = run(chat.main, *arguments, "--question", QUESTION)
    assert once.exit_code == 0 and once.stdout.strip()
    assert run(chat.main, *arguments, "--question", QUESTION).stdout == once.stdout
    typed = run(chat.main, *arguments, typed=f"{QUESTION}\nAnd?\n\nnever asked\n")
    assert typed.stdout.splitlines()[0] == once.stdout.splitlines()[0]
    other = run(chat.main, *arguments[:3], images[1], *arguments[4:], "--question", QUESTION)
    assert other.stdout != once.stdout, "another image, another answer"


def test_text_only(export: Path) -> None:
    answer = run(chat.main, "--model", export, "--question", QUESTION, "--max-new-tokens", 4, "--device", "cpu")
    assert answer.exit_code == 0


def test_errors_are_one_line(export: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    base = Path(shutil.copytree(export, tmp_path / "base"))
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".mm_projector.", ".x."))
    for arguments, message in (
        (("--model", tmp_path), "no config.json; --model takes a folder made by `make export`"),
        (("--model", base), "is a base without projectors"),
        (("--model", export, "--image", tmp_path / "none.png"), "none.png: no such file"),
        (("--model", export, "--image", tmp_path / "text.png"), "text.png: not a readable image"),
        (("--model", export, "--image", tmp_path / "pipe.png"), "pipe.png is a pipe or a device"),
        (("--model", export, "--image", "/dev/zero"), "/dev/zero is a pipe or a device"),
        (("--model", export, "--question", "word " * 300), "positions, the model takes 256; start again"),
    ):
        result = run(chat.main, "--question", QUESTION, *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert run(chat.main, "--model", export, "--question", " ").exit_code == 2
