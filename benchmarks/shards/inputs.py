"""Generated input: JPEGs that cost what photos cost, and LLaVA's rows about them; the repository ships no data.

A photo is a crop of a texture: noise at every scale, weaker the finer it is, as in natural images. Of 640x480 pixels it
makes a file of about 60 KB at quality 85 (`WEB`). COCO's photos are mostly like quality 95 without chroma subsampling
(`COCO`), which gives about 150 KB here, and twice the time to decode.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WEB, COCO = {"quality": 85}, {"quality": 95, "subsampling": 0}
FALLOFF = 0.75  # of the noise from one scale to the next finer one
WORDS = ("a", "man", "woman", "child", "dog", "red", "bus", "with", "on", "the", "of", "near", "table", "small")
PROMPTS = ("What is in the picture?", "Describe the image.", "What is the person doing?", "Which colors do you see?")
NUM_ANSWERS = 1000


@cache
def texture(pixels: int) -> Image.Image:
    """Returns a square picture of so many pixels a side, to cut photos from."""
    rng = np.random.default_rng(0)

    def plane(scales: Iterable[int], strength: float) -> Image.Image:
        total = np.full((pixels, pixels), 128.0, np.float32)
        for step, scale in enumerate(scales):
            noise = Image.fromarray(rng.standard_normal((pixels >> scale, pixels >> scale), np.float32))
            total += strength * FALLOFF**step * np.asarray(noise.resize((pixels, pixels), Image.Resampling.BICUBIC))
        return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))

    planes = plane(range(9, -1, -1), 50), plane(range(9, 4, -1), 20), plane(range(9, 4, -1), 20)
    return Image.merge("YCbCr", planes).convert("RGB")


def write_photo(job: tuple[Path, int, int], options: Mapping[str, Any]) -> int:
    """Returns the bytes of the JPEG that it wrote to (path, width, height); its name decides its pixels."""
    path, width, height = job
    rng, pixels = random.Random(path.name), 1024 if max(width, height) < 1000 else 2560
    left, top = rng.randrange(pixels - width), rng.randrange(pixels - height)
    texture(pixels).crop((left, top, left + width, top + height)).save(path, **options)
    return path.stat().st_size


def write_photos(folder: Path, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> int:
    """Returns the bytes of the photos 000000.jpg ... that it wrote to the folder, one for each (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"{number:06d}.jpg", *size) for number, size in enumerate(sizes)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return sum(pool.map(partial(write_photo, options=options), jobs, chunksize=1 + len(jobs) // 16))


@cache
def answers() -> list[str]:
    """Returns texts of 5 to 100 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 100))).capitalize() + "." for _ in range(NUM_ANSWERS)]


def llava_row(number: int, image: str | None, num_questions: int, rng: random.Random) -> dict:
    """Returns a row as LLaVA's instruction data has them; without an image it is text only."""
    turns = []
    for question in range(num_questions):
        prompt = rng.choice(PROMPTS)
        turns.append({"from": "human", "value": f"<image>\n{prompt}" if image and not question else prompt})
        turns.append({"from": "gpt", "value": rng.choice(answers())})
    return {"id": f"{number:012d}"} | ({"image": image} if image else {}) | {"conversations": turns}


def write_rows(path: Path, images: Iterable[str | None], mean_questions: int = 3) -> int:
    """Returns the number of rows of the JSON array that it wrote, one row for each image (None: text only)."""
    rng, number = random.Random(0), -1
    with path.open("w") as file:
        for number, image in enumerate(images):
            row = llava_row(number, image, rng.randint(1, 2 * mean_questions - 1), rng)
            file.write(f"{',' if number else '['}\n{json.dumps(row)}")
        file.write("\n]\n")
    return number + 1


def write_data_set(
    folder: Path, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any] = WEB
) -> tuple[Path, Path, int]:
    """Returns the rows, the folder of the photos they are about, and the bytes of these photos."""
    num_bytes = write_photos(folder / "images", sizes, options)
    write_rows(folder / "rows.json", (f"{number:06d}.jpg" for number in range(len(sizes))))
    return folder / "rows.json", folder / "images", num_bytes
