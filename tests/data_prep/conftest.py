"""A small LLaVA data set with every kind of row that is fit to train on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.kills import NO_COMMIT


@pytest.fixture(scope="module", autouse=True)
def no_commit() -> Iterator[None]:
    """Lets two runs be compared to the byte while somebody commits."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in NO_COMMIT.items():
            environment.setenv(name, value)
        yield


@dataclass
class Dataset:
    """A data set on disk: `data` is the JSON of `rows`, `images` the folder its paths are relative to."""

    data: Path
    images: Path
    rows: list[dict]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """30 rows: one image (PNG, JPEG, a GIF that is called .jpg), two images, none; texts beyond ASCII; extra keys."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    rows = []
    for i in range(24):
        name, kind = [("%d.png", "PNG"), ("deep/%d.jpg", "JPEG"), ("%d.jpg", "GIF")][i % 3]
        Image.new("RGB", (16 + i, 20), (9 * i, 40, 80)).save(folder / (name % i), kind)
        rows.append(
            {"id": f"row-{i}", "image": name % i, "conversations": _turns(f"<image>\nWhat is {i}?", "caf\u00e9")}
        )
    for i in range(24, 27):
        rows.append({"id": i, "conversations": _turns("Say hello.", "\u4f60\u597d \U0001f600"), "model": ""})
    for i in range(27, 30):
        turns = _turns("<image> and <image>: which is larger?", "the second", "Sure?", "yes")
        rows.append({"image": ["0.png", f"deep/{i - 26}.jpg" if i < 28 else "3.png"], "conversations": turns})
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows, indent=1))
    return Dataset(data, folder, rows)


def _turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
