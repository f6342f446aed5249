"""The drawn data set: one right answer each, nothing to gain without looking, nothing of the test in training."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from data_prep.shapes import (
    CELLS,
    COLORS,
    FAMILIES,
    KINDS,
    Scene,
    caption,
    draw_questions,
    draw_scene,
    render,
    write_dataset,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, num_train=1500, num_test=300, seed=0, image_size=64)
    return folder


def rows(dataset: Path, name: str) -> list[dict]:
    return json.loads((dataset / f"{name}.json").read_text())


def turns(row: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def test_who_sees_only_the_question_is_wrong_more_often_than_right(dataset: Path) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows(dataset, "finetune"):
        for question, answer in turns(row):
            answers[question][answer] += 1
    test = [turns(row)[0] for row in rows(dataset, "test")]
    assert {question for question, _ in test} <= set(answers), "no question is new"
    guessed = [answers[question].most_common(1)[0][0] == answer for question, answer in test]
    assert sum(guessed) / len(guessed) <= 0.45


def test_no_layout_of_a_test_image_occurs_in_training() -> None:
    scenes = [draw_scene(random.Random(seed)) for seed in range(3000)]
    held_out = {scene.layout for scene in scenes if scene.held_out}
    assert 0.05 < len(held_out) / len({scene.layout for scene in scenes}) < 0.2
    assert held_out.isdisjoint(scene.layout for scene in scenes if not scene.held_out)


def test_the_split_is_by_what_is_seen_not_by_shifts() -> None:
    centred = Scene("circle", "red", ("top left",), ((0.0, 0.0),))
    shifted = Scene("circle", "red", ("top left",), ((0.07, -0.07),))
    assert centred.layout == shifted.layout and centred.held_out == shifted.held_out


def test_files_share_no_picture(dataset: Path) -> None:
    digests: dict[str, set[str]] = defaultdict(set)
    for file in (dataset / "images").iterdir():
        digests[file.name.split("-")[0]].add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(digests["test"]) == 300, "test pictures all differ"
    assert digests["test"].isdisjoint(digests["train"])


def right_answers(scene: Scene, family: str, question: str) -> set[str]:
    """Answers that the scene allows, worked out again from what is drawn."""
    match family:
        case "color":
            return {scene.color}
        case "shape":
            return {scene.kind}
        case "count":
            return {str(len(scene.cells))}
        case "position":
            return set(scene.cells)
    if question == "Is there more than one shape?":
        return {"yes" if len(scene.cells) > 1 else "no"}
    cell = question.removeprefix("Is there a shape at the ").removesuffix("?")
    return {"yes" if cell in scene.cells else "no"}


def test_every_question_has_one_right_answer_and_it_is_the_one_given() -> None:
    asked: set[str] = set()
    for seed in range(500):
        rng = random.Random(seed)
        scene = draw_scene(rng)
        for question in draw_questions(rng, scene):
            assert right_answers(scene, question.family, question.text) == {question.answer}, (scene, question)
            asked.add(question.family)
    assert asked == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_drawn_where_and_in_the_color_it_is_said_to_be(kind: str) -> None:
    color = list(COLORS)[-1]
    for cell, (column, row) in CELLS.items():
        picture = render(Scene(kind, color, (cell,), ((0.0, 0.0),)), 64)
        box = (column * 32, row * 32, column * 32 + 32, row * 32 + 32)
        inside = Counter({c: n for n, c in picture.crop(box).getcolors() or []})[COLORS[color]]
        assert Counter({c: n for n, c in picture.getcolors() or []})[COLORS[color]] == inside > 200
        assert len(picture.getcolors() or []) == 2, "no anti-aliasing"


def test_kinds_cover_their_boxes_differently() -> None:
    areas = {
        kind: Counter({c: n for n, c in render(Scene(kind, "red", ("top left",), ((0, 0),)), 64).getcolors() or []})
        for kind in KINDS
    }
    covered = {kind: count[COLORS["red"]] / 24**2 for kind, count in areas.items()}
    assert covered["square"] == 1.0
    assert covered["circle"] == pytest.approx(3.14159 / 4, abs=0.03)
    assert covered["triangle"] == pytest.approx(0.5, abs=0.04)
    assert covered["cross"] == pytest.approx(5 / 9, abs=0.01)


def test_captions_say_all_there_is() -> None:
    one = Scene("circle", "red", ("top left",), ((0, 0),))
    two = Scene("cross", "black", ("top left", "bottom right"), ((0, 0), (0, 0)))
    assert caption(one) == "a red circle at the top left"
    assert caption(two) == "2 black crosses at the top left and the bottom right"


def test_rows_are_llava_rows(dataset: Path) -> None:
    pretrain, finetune, test = (rows(dataset, name) for name in ("pretrain", "finetune", "test"))
    assert len(pretrain) == 1500 and {len(row["conversations"]) for row in pretrain} == {2}
    text_only = [row for row in finetune if "image" not in row]
    assert len(text_only) / len(finetune) == pytest.approx(0.06, abs=0.005)
    assert max(len(row["conversations"]) for row in finetune) > 2
    for row in pretrain + finetune + test:
        marks = [turn["value"].count("<image>") for turn in row["conversations"]]
        assert marks == [int("image" in row)] + [0] * (len(marks) - 1)
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(marks) // 2)
    assert {row["family"] for row in test} == set(FAMILIES)
    with Image.open(dataset / "images" / test[0]["image"]) as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dataset(tmp_path / name, num_train=20, num_test=5, seed=seed, image_size=32)
    a, b, c = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    )
    assert a == b
    assert a.keys() == c.keys() and a != c
