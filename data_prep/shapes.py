"""A LLaVA-format data set that needs no download: pictures of coloured shapes, captions, questions.

    python -m data_prep.shapes --out data/shapes --num-train 6000 --num-test 500 --seed 0

    OUT/images/train-000000.png ...   one to four equal shapes, each in its own quarter
    OUT/pretrain.json                 one caption per training image
    OUT/finetune.json                 several questions per training image, and some rows without an image
    OUT/test.json                     one question per row about images of scenes that never occur in training

A scene is a pure function of a random generator, and everything else is a function of the scene:

    Scene("circle", "red", ("top left", "bottom right"), ...)
      caption    2 red circles at the top left and the bottom right
      color      Which color do the shapes have?         red
      shape      What shape is drawn?                    circle
      position   Where is the circle?                    asked only when there is one
      count      How many shapes are there?              2
      exists     Is there a shape at the bottom left?    no

Every question has one right answer, and answers are balanced for each wording: who sees the question but not the
picture is right about a third of the time (tests/data_prep/test_shapes.py measures it).
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw

from common.console import UsageError, run
from common.files import named_errors

KINDS = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (226, 32, 32),
    "green": (24, 164, 64),
    "blue": (32, 72, 232),
    "yellow": (248, 200, 0),
    "purple": (160, 40, 200),
    "black": (24, 24, 24),
}
BACKGROUND = (244, 244, 240)
CELLS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
"""Column and row of each quarter of the picture."""
COUNTS, COUNT_WEIGHTS = (1, 2, 3, 4), (4, 2, 2, 2)
FAMILIES = ("color", "shape", "position", "count", "exists")

SHIFTS = (-0.07, 0.0, 0.07)
TEXT_ONLY_FRACTION = 0.06
HELD_OUT_EVERY = 8
"""One layout in this many belongs to the test images."""

MOST_MISSES = 10_000  # draws without a new held-out picture: there are hardly any left

INSTRUCTIONS = ("Describe the image.", "What is in the picture?", "Write a caption.", "What shapes are shown?")
WORD_QUESTIONS = (
    ("What is the opposite of left?", "right"),
    ("What is the opposite of top?", "bottom"),
    ("How many sides does a triangle have?", "3"),
    ("How many sides does a square have?", "4"),
    ("What color is grass?", "green"),
    ("What color is a banana?", "yellow"),
)


@dataclass(frozen=True)
class Scene:
    """One to four equal shapes, each in its own quarter of the picture, shifted by fractions of the quarter's side."""

    kind: str
    color: str
    cells: tuple[str, ...]
    shifts: tuple[tuple[float, float], ...]

    @property
    def layout(self) -> str:
        """What can be said about the scene; the small shifts are not part of it."""
        return f"{self.color} {self.kind}: {', '.join(self.cells)}"

    @property
    def held_out(self) -> bool:
        """True if this layout is only for test images: decided by its content, whatever the seed and the sizes."""
        return hashlib.sha256(self.layout.encode()).digest()[0] % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and its family (`text` for those without an image)."""

    family: str
    text: str
    answer: str


def draw_scene(rng: random.Random) -> Scene:
    """Returns a scene of one to four shapes of one kind and one colour."""
    (count,) = rng.choices(COUNTS, COUNT_WEIGHTS)
    cells = sorted(rng.sample(list(CELLS), count), key=list(CELLS).index)
    shifts = tuple((rng.choice(SHIFTS), rng.choice(SHIFTS)) for _ in cells)
    return Scene(rng.choice(KINDS), rng.choice(list(COLORS)), tuple(cells), shifts)


def render(scene: Scene, image_size: int) -> Image.Image:
    """Returns the picture, RGB of `image_size` x `image_size` pixels. A shape is three quarters of a cell wide."""
    image = Image.new("RGB", (image_size, image_size), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    cell_size = image_size / 2
    radius = 0.375 * cell_size
    color = COLORS[scene.color]
    for cell, shift in zip(scene.cells, scene.shifts, strict=True):
        column, row = CELLS[cell]
        x = (column + 0.5 + shift[0]) * cell_size
        y = (row + 0.5 + shift[1]) * cell_size
        left, top, right, bottom = round(x - radius), round(y - radius), round(x + radius) - 1, round(y + radius) - 1
        third = (right + 1 - left) // 3
        match scene.kind:
            case "circle":
                canvas.ellipse((left, top, right, bottom), fill=color)
            case "square":
                canvas.rectangle((left, top, right, bottom), fill=color)
            case "triangle":
                canvas.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=color)
            case "cross":
                canvas.rectangle((left + third, top, right - third, bottom), fill=color)
                canvas.rectangle((left, top + third, right, bottom - third), fill=color)
            case _:
                raise AssertionError(scene.kind)
    return image


def caption(scene: Scene) -> str:
    """Returns all there is to see: "a red circle at the top left", "3 black crosses at the top left and ..."."""
    count = len(scene.cells)
    things = f"a {scene.color} {scene.kind}" if count == 1 else f"{count} {scene.color} {_plural(scene.kind)}"
    return f"{things} at the {' and the '.join(scene.cells)}"


def draw_question(rng: random.Random, scene: Scene, family: str) -> Question | None:
    """Returns a question of `family` with exactly one right answer, or None where this scene allows none."""
    match family:
        case "color":
            asked, answer = rng.choice(("What color is drawn?", "Which color do the shapes have?")), scene.color
        case "shape":
            asked, answer = rng.choice(("What shape is drawn?", "Which kind of shape is it?")), scene.kind
        case "count":
            asked, answer = rng.choice(("How many shapes are there?", "Count the shapes.")), str(len(scene.cells))
        case "position" if len(scene.cells) == 1:
            asked, answer = f"Where is the {rng.choice((scene.kind, 'shape'))}?", scene.cells[0]
        case "position":
            return None  # several shapes are in several places
        case "exists" if len(scene.cells) < len(CELLS) and rng.random() < 0.3:
            present = rng.random() < 0.5
            cell = rng.choice([cell for cell in CELLS if (cell in scene.cells) == present])
            asked, answer = f"Is there a shape at the {cell}?", "yes" if present else "no"
        case "exists":
            asked, answer = "Is there more than one shape?", "yes" if len(scene.cells) > 1 else "no"
        case _:
            raise AssertionError(family)
    return Question(family, asked, answer)


def draw_questions(rng: random.Random, scene: Scene) -> list[Question]:
    """Returns one question of each family that the scene allows, in random order."""
    families = rng.sample(FAMILIES, len(FAMILIES))
    return [question for family in families if (question := draw_question(rng, scene, family))]


def draw_text_question(rng: random.Random) -> Question:
    """Returns a question that needs no image: a sum of two digits, or a word question."""
    if rng.random() < 0.5:
        return Question("text", *rng.choice(WORD_QUESTIONS))
    left = rng.randint(1, 5)
    right = rng.randint(1, 9 - left)
    return Question("text", f"What is {left} plus {right}?", str(left + right))


def draw_scenes(rng: random.Random, num_scenes: int, held_out: bool) -> Iterator[Scene]:
    """Yields scenes of one side of the split; test scenes are all different, training scenes may come again.

    Raises:
        UsageError: there are not so many different test scenes.
    """
    seen: set[Scene] = set()
    num_drawn = num_misses = 0
    while num_drawn < num_scenes:
        scene = draw_scene(rng)
        if scene.held_out == held_out and not (held_out and scene in seen):
            seen.add(scene)
            num_drawn, num_misses = num_drawn + 1, 0
            yield scene
        elif (num_misses := num_misses + 1) > MOST_MISSES:
            raise UsageError(f"--num-test={num_scenes}: there are hardly more than {num_drawn} held-out pictures")


def write_dataset(out: Path, num_train: int, num_test: int, seed: int, image_size: int) -> None:
    """Writes the data set under `out`; the same arguments give the same bytes."""
    with named_errors(out):  # Pillow's own do not say where
        _write_dataset(out, num_train, num_test, seed, image_size)


def _write_dataset(out: Path, num_train: int, num_test: int, seed: int, image_size: int) -> None:
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    pretrain, finetune, test = [], [], []

    rng = random.Random(f"{seed} train")
    for index, scene in enumerate(draw_scenes(rng, num_train, held_out=False)):
        name = f"train-{index:06}.png"
        render(scene, image_size).save(images / name)
        pair = (rng.choice(INSTRUCTIONS), caption(scene))
        pretrain.append(_row(f"pretrain-{index:06}", name, [pair]))
        finetune.append(_row(f"finetune-{index:06}", name, [(q.text, q.answer) for q in draw_questions(rng, scene)]))
    for index in range(round(num_train * TEXT_ONLY_FRACTION / (1 - TEXT_ONLY_FRACTION))):
        questions = [draw_text_question(rng) for _ in range(rng.randint(1, 3))]
        finetune.append(_row(f"text-{index:06}", None, [(q.text, q.answer) for q in questions]))

    rng = random.Random(f"{seed} test")
    for index, scene in enumerate(draw_scenes(rng, num_test, held_out=True)):
        name = f"test-{index:06}.png"
        render(scene, image_size).save(images / name)
        for turn, question in enumerate(draw_questions(rng, scene)):
            row = _row(f"test-{index:06}-{turn}", name, [(question.text, question.answer)])
            test.append(row | {"family": question.family})

    for file, rows in (("pretrain.json", pretrain), ("finetune.json", finetune), ("test.json", test)):
        (out / file).write_text(json.dumps(rows, indent=1) + "\n")


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _row(row_id: str, image: str | None, turns: list[tuple[str, str]]) -> dict:
    """Returns a LLaVA row; `<image>` stands in the first human turn."""
    conversations = []
    for turn, (question, answer) in enumerate(turns):
        mark = "<image>\n" if image and turn == 0 else ""
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": row_id} | ({"image": image} if image else {}) | {"conversations": conversations}


def main(
    out: Annotated[Path, typer.Option(help="folder to write")],
    num_train: Annotated[int, typer.Option(help="training images")] = 6000,
    num_test: Annotated[int, typer.Option(help="test images, about five questions each")] = 500,
    seed: Annotated[int, typer.Option(help="another seed, other pictures")] = 0,
    image_size: Annotated[int, typer.Option(help="pixels per side")] = 64,
) -> None:
    """Draw a small LLaVA-format data set of shapes."""
    for option, value, minimum in (
        ("num-train", num_train, 1),
        ("num-test", num_test, 0),
        ("image-size", image_size, 16),
    ):
        if value < minimum:
            raise UsageError(f"--{option}={value} must be at least {minimum}")
    write_dataset(out, num_train, num_test, seed, image_size)


if __name__ == "__main__":
    run(main)
