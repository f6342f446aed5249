"""Which questions are asked, how, and what counts as right."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from common.console import UsageError, command
from model import hf_export
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.processing_saisa import SaisaProcessor
from pipeline.evaluation import answers as answering
from pipeline.evaluation import evaluate as module
from pipeline.evaluation.evaluate import evaluate, find_images, parse_rows
from pipeline.evaluation.questions import (
    SHORT_ANSWER,
    Answer,
    EvaluationResult,
    Question,
    question_only_accuracy,
    read_questions,
)
from tests.hf_compat.make_folder import make_export


def row(image: str | None, *turns: str, **more: Any) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": f"row-{image}"} | ({"image": image} if image else {}) | {"conversations": said} | more


def ask(text: str, expected: str, family: str = "") -> Question:
    return Question("r", family, (), text, expected)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random export, two pictures, and rows with and without them."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_export(folder / "work", folder / "model", "llama", "clip", "mlp")
    for number in (0, 1):
        noise = torch.randint(0, 256, (30, 30, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    rows = [
        row("0.png", "<image>\nWhat is the colour of the square on the left?", "red", "Is it?", "yes", family="color"),
        row(None, "Say something.", "no", family="text"),
        row("1.png", "<image>\nIs it?", "no", family="color"),
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def test_every_question_of_a_row_is_asked_on_its_own(tmp_path: Path) -> None:
    rows = [
        row("a.png", f"<image>\nWhat shape?\n{SHORT_ANSWER}", "circle", "Is it red?", " Yes"),
        row("b.png", "What is it?\n<image>", "a cat", "Where?", "here", family="place"),
        row(None, "Two plus two?", "4"),
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    asked = read_questions(tmp_path / "x.json")
    assert [question.prompt for question in asked] == [
        f"<image>\nWhat shape?\n{SHORT_ANSWER}",
        f"<image>\nIs it red?\n{SHORT_ANSWER}",
        "<image>\nWhat is it?",
        "<image>\nWhere?",
        "Two plus two?",
    ]
    assert [question.expected for question in asked] == ["circle", "Yes", "a cat", "here", "4"]
    assert [question.family for question in asked] == ["", "", "place", "place", ""]
    assert [question.text for question in read_questions(tmp_path / "x.json", slice(1, 2))] == ["What is it?", "Where?"]


def test_case_and_space_do_not_count_and_families_are_scored_apart() -> None:
    said = [
        Answer(ask("a", "Red", "color"), " red\n"),
        Answer(ask("b", "red", "color"), "red."),
        Answer(ask("c", "2"), "2"),
    ]
    result = EvaluationResult(tuple(said))
    assert [answer.correct for answer in said] == [True, False, True]
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.per_family == {"color": 0.5}


def test_the_baseline_answers_each_wording_with_its_majority_and_new_ones_with_the_majority_of_all() -> None:
    train = [ask("a", "yes"), ask("a", "Yes"), ask("a", "no"), ask("b", "no"), ask("b", "no"), ask("b", "no")]
    test = [ask("a", "YES"), ask("a", "no"), ask("b", "no"), ask("new", "no"), ask("new", "yes")]
    assert question_only_accuracy(train, test) == pytest.approx(3 / 5)


def test_answers_are_those_of_one_question_at_a_time(world: Path) -> None:
    together = evaluate(world / "model", world / "test.json", world, batch_size=64, max_new_tokens=6)
    alone = evaluate(world / "model", world / "test.json", world, batch_size=1, max_new_tokens=6)
    assert together == alone, "neither padding nor batches of other questions change an answer"
    assert [answer.question.text for answer in together.answers][1:] == ["Is it?", "Say something.", "Is it?"]
    assert together.answers[1].text != together.answers[3].text, "the same question about two pictures"


def test_blind_sees_the_same_in_every_picture(world: Path) -> None:
    blind = evaluate(world / "model", world / "test.json", world, blind=True, max_new_tokens=6)
    seeing = evaluate(world / "model", world / "test.json", world, max_new_tokens=6)
    assert blind.answers[1].text == blind.answers[3].text
    assert seeing.answers[1].text != seeing.answers[3].text
    assert blind.answers[2] == seeing.answers[2], "a question without a picture loses nothing"


def test_a_cut_answer_is_counted_and_an_answer_that_ends_is_not(world: Path, monkeypatch) -> None:
    """A model that says three tokens and its end: two allowed cut all answers, four none."""
    monkeypatch.setattr(hf_export, "load_model", Speaks.from_pretrained)
    cut = evaluate(world / "model", world / "test.json", world, max_new_tokens=3)
    whole = evaluate(world / "model", world / "test.json", world, max_new_tokens=4)
    assert (cut.num_cut, whole.num_cut) == (4, 0)
    assert {answer.text for answer in cut.answers} == {answer.text for answer in whole.answers}


class Speaks:
    """A model whose answers are three tokens and the end of text."""

    @classmethod
    def from_pretrained(cls, folder: Path, **_: Any) -> Any:
        model = SaisaForConditionalGeneration.from_pretrained(folder)
        (end,) = answering._end_ids(model)

        def generate(input_ids, max_new_tokens, **_: Any) -> torch.Tensor:
            said = torch.tensor([[5, 6, 7, end, 5, 5]]).expand(len(input_ids), -1)
            return torch.cat([input_ids, said[:, :max_new_tokens]], 1)

        monkey: Any = model
        monkey.generate = generate
        return model


def test_a_question_that_fills_the_models_positions_is_not_asked_but_counted(world: Path, tmp_path: Path) -> None:
    long = "word " * 2000
    rows = [row(None, "Say something.", "no"), row("0.png", f"<image>\n{long}?", "yes")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    result = evaluate(world / "model", tmp_path / "test.json", world, max_new_tokens=2)
    assert [answer.question.text for answer in result.answers] == ["Say something."]
    assert [question.row_id for question in result.too_long] == ["row-0.png"]
    shown = run("--model", world / "model", "--data", tmp_path / "test.json", "--images", world, "--max-new-tokens", 1)
    assert "of 1 question\n" in shown.output and "1 answer cut short" in shown.output
    assert "1 question not asked, too long for the model's positions; first record 'row-0.png'" in shown.output
    (tmp_path / "test.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="model: every question fills the .* positions of the model"):
        evaluate(world / "model", tmp_path / "test.json", world)


def test_an_answer_ends_with_the_models_positions(world: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever the batch: of two questions, the longer has room for fewer tokens than the three and the end."""
    processor = SaisaProcessor.from_pretrained(world / "model")
    limit = SaisaForConditionalGeneration.from_pretrained(world / "model").config.max_position_embeddings

    def room(num_words: int) -> int:
        return limit - len(processor.tokenize(answering.prompt_of(ask("a " * num_words + "a", ""), processor)))

    long = next(num_words for num_words in range(limit) if room(num_words) <= 3)
    rows = [row(None, "a " * long + "a", "x"), row(None, "Say something.", "no")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    monkeypatch.setattr(hf_export, "load_model", Speaks.from_pretrained)
    answers = evaluate(world / "model", tmp_path / "test.json", world).answers
    assert 0 < room(long) <= 3 and [answer.is_cut for answer in answers] == [True, False]
    assert answers[0].text == processor.tokenizer.decode([5, 6, 7][: room(long)], skip_special_tokens=True).strip()


def test_rows_with_their_images_inside_are_answered_as_the_same_rows_with_files(world: Path, tmp_path: Path) -> None:
    """Images of two rows may have the same path."""
    rows = json.loads((world / "test.json").read_text())
    for index in (0, 2):
        rows[index]["image"] = {"bytes": (world / rows[index]["image"]).read_bytes(), "path": "picture.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    options: dict[str, Any] = {"rows": slice(0, 3), "max_new_tokens": 6}
    expected = evaluate(world / "model", world / "test.json", world, **options).answers
    inside = evaluate(world / "model", tmp_path / "test.parquet", **options).answers
    assert len({answer.text for answer in expected}) > 1
    assert [answer.text for answer in inside] == [answer.text for answer in expected]
    assert [answer.question.images for answer in inside] == [("picture.png",), ("picture.png",), (), ("picture.png",)]
    with pytest.raises(ValueError, match=r"0.png: no such image, wanted by record 'row-0.png'; not inside the rows"):
        evaluate(world / "model", world / "test.json")


def test_a_blank_picture_is_all_zeros_to_the_encoder(world: Path) -> None:
    processor = SaisaProcessor.from_pretrained(world / "model")
    with Image.open(world / "0.png") as picture:
        pixels = processor.image_processor(answering._blank(picture, processor), return_tensors="pt").pixel_values
    assert pixels.abs().max() < 0.01, "half of 1/255, divided by a standard deviation of 0.26"


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command(module.main))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_scores_answers_and_the_baseline(world: Path, tmp_path: Path) -> None:
    shown = run(
        "--model", world / "model", "--data", world / "test.json", "--images", world, "--rows", "1:",
        "--baseline-data", world / "test.json", "--out", tmp_path / "new" / "result.json",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["num_questions"] == len(written["answers"]) == 2
    assert written["baseline_accuracy"] == 0.5, "`Is it?` is answered yes as often as no"
    assert "of 2 questions" in shown.output and "50.0% from the question alone" in shown.output


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--rows", "3"], 2, "--rows='3' must be a:b"),
        (["--rows", "5:5"], 2, "must name at least one row"),
        (["--rows", "9:"], 1, "no question in rows 9:"),
        (["--baseline-rows", ":1"], 2, "--baseline-rows chooses from --baseline-data"),
        (["--model", "nowhere"], 1, "nowhere: no config.json"),
        (["--data", "nowhere.json"], 1, "nowhere.json: No such file"),
        (["--images", "nowhere"], 1, "nowhere is not there; give a folder or a zip"),
    ],
)
def test_mistakes_are_named_in_one_line(world: Path, options: list[str], status: int, message: str) -> None:
    usual = {"--model": world / "model", "--data": world / "test.json", "--images": world}
    usual |= dict(zip(options[::2], options[1::2], strict=True))
    shown = run(*[part for pair in usual.items() for part in pair])
    assert shown.exit_code == status
    assert message in shown.output and shown.output.count("\n") == 1


def test_rows_are_named_like_slices() -> None:
    assert (parse_rows(None), parse_rows("2:5"), parse_rows(":3")) == (slice(None), slice(2, 5), slice(None, 3))
    with pytest.raises(UsageError, match="counted from the front"):
        parse_rows("-5:")


def test_images_are_found_as_sharding_finds_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    asked = [Question("7", "", ("a.jpg", "a.png"), "what?", "a")]
    assert {path: entry.found_as for (_, path), entry in find_images(asked, tmp_path).items()} == {
        "a.jpg": "a.png",
        "a.png": None,
    }
    for path, told in (("../a.png", "must be relative and stay under"), ("b.png", "b.png: no such image")):
        with pytest.raises(ValueError, match=told):
            find_images([Question("7", "", (path,), "what?", "a")], tmp_path)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "folder link"])
def test_no_image_outside_the_folder_is_read(world: Path, tmp_path: Path, kind: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "link.png").symlink_to(world / "0.png")
    (images / "folder").symlink_to(world)
    Image.open(world / "0.png").save(tmp_path / "0.png")
    name = {"parent": "../0.png", "absolute": str(world / "0.png"), "link": "link.png", "folder link": "folder/0.png"}
    (tmp_path / "test.json").write_text(json.dumps([row(name[kind], "<image>\nIs it?", "no")]))
    for spelled in (images, f"file://{images}"):
        with pytest.raises(ValueError, match=r"must be relative and stay under|is a link that leads out of"):
            evaluate(world / "model", tmp_path / "test.json", spelled)
    (tmp_path / "images link").symlink_to(world)  # the folder itself may be one
    (tmp_path / "test.json").write_text(json.dumps([row("0.png", "<image>\nIs it?", "no")]))
    assert evaluate(world / "model", tmp_path / "test.json", tmp_path / "images link", max_new_tokens=1).num_questions
