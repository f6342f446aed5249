"""The loss curve, the page of examples, the table."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from common.console import describe
from data_prep.shapes import write_dataset
from orchestration.demo_report import choose_examples, print_scores, running_mean, write_examples, write_loss_curve
from pipeline.evaluation.evaluate import write_result
from pipeline.evaluation.questions import Answer, EvaluationResult, Question
from tests.full_disk import no_file_larger_than


def result(answers: list[str]) -> EvaluationResult:
    """Answers to questions of two families about three pictures; `yes` is right."""
    return EvaluationResult(
        tuple(
            Answer(Question(str(i), ("color", "count")[i % 2], (f"{i // 2}.png",), f"Is <b> {i}?", "yes"), text)
            for i, text in enumerate(answers)
        )
    )


SEEING = result(["yes", "no", "Yes ", "yes", "yes", "<i>"])
BLIND = result(["no", "no", "yes", "no", "no", "no"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (64, 48), (number, 0, 255)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_the_running_mean_starts_at_the_first_value_and_halves_the_past() -> None:
    assert running_mean([4.0, 1.0], half_life=1) == pytest.approx([4.0, (2.0 + 1.0) / 1.5])


def test_the_curve_has_a_panel_for_each_stage(tmp_path: Path) -> None:
    stage1 = [{"step": step, "loss": 5.0 / step} for step in range(1, 40)]
    write_loss_curve(stage1, [], tmp_path / "new" / "loss.png")
    with Image.open(tmp_path / "new" / "loss.png") as curve:
        pixels = curve.convert("RGB")
    left, right = (pixels.crop((x, 0, x + pixels.width // 2, pixels.height)) for x in (0, pixels.width // 2))
    blue = (0x2A, 0x6F, 0xB0)
    assert [any(color == blue for _, color in half.getcolors(1 << 20) or []) for half in (left, right)] == [True, False]


def test_what_finds_no_room_is_named(images: Path) -> None:
    for write, name in (
        (lambda out: write_loss_curve([], [], out), "loss.png"),
        (lambda out: write_examples(SEEING, BLIND, images, out), "page.html"),
        (lambda out: write_dataset(out, 2, 1, seed=0, image_size=64), "data"),
        (lambda out: write_result(SEEING, out), "result.json"),
    ):
        with no_file_larger_than(100), pytest.raises(OSError) as error:
            write(images / name)
        assert describe(error.value).startswith(f"{images / name}: File too large; no file may be that large there")
        assert not list(images.glob("*.part")) and not (images / name).is_file()


def test_examples_take_families_in_turn_and_new_pictures_first() -> None:
    chosen = [answer.question for answer, _ in choose_examples(SEEING, BLIND, 4)]
    assert [question.family for question in chosen] == ["color", "count", "color", "count"]
    assert len({question.images for question in chosen}) == 3
    assert len(choose_examples(SEEING, BLIND, 100)) == 6, "all there are, each once"


def test_the_page_shows_what_was_said_and_needs_no_other_file(images: Path) -> None:
    write_examples(SEEING, BLIND, images, images / "page.html", num_examples=6)
    page = (images / "page.html").read_text()
    assert page.count("<article") == 6
    assert page.count('<article class="card missed">') == 2
    assert "66.7% of 6 questions right, 16.7% without the picture" in page
    assert "&lt;i&gt;" in page and "<i>" not in page and "Is &lt;b&gt; 0?" in page
    assert not re.search(r'src="(?!data:)|href=', page)
    encoded = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == (192, 144), "three times as large, so that it can be seen"


def test_the_table_compares_seeing_with_blind() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    print_scores(SEEING, BLIND, console)
    rows = [re.findall(r"[\w.%]+", line) for line in console.export_text().splitlines()]
    assert ["color", "3", "100.0%", "33.3%"] in rows
    assert ["count", "3", "33.3%", "0.0%"] in rows
    assert ["all", "6", "66.7%", "16.7%"] in rows


def test_answers_to_other_questions_are_not_compared() -> None:
    other = replace(BLIND, answers=BLIND.answers[::-1])
    with pytest.raises(ValueError, match="not to the same questions"):
        print_scores(SEEING, other, Console(file=io.StringIO()))
