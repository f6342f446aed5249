"""Read, decode and resize a photo on one core: SAISA's two paths, LLaVA's own, and torchvision with nothing around it.

    python -m benchmarks.decode --photos PHOTOS_FOLDER

The four take turns at every photo, in random order, in one process with one thread; files come from the page cache.
Time is CPU time of the process, which other jobs on the machine disturb least. A ratio is the median of the rounds'
ratios. Two minutes for 39 photos.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import CLIPImageProcessor

from common.console import build_console, run
from model.hf.image_processing_saisa import CLIP_MEAN, SaisaImageProcessor
from pipeline.data.images import decode_image, is_fast

SIZE = 336
FAST, EXACT, LLAVA, BARE = "SAISA", "SAISA, exact", "LLaVA: Pillow and CLIPImageProcessor", "torchvision alone"
CLIP: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Returns an image padded to a square. Source: LLaVA, `expand2square` in llava/mm_utils.py."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def paths(aspect_ratio: str) -> dict[str, Callable[[Path], Tensor]]:
    """Returns the ways from a file to pixels: LLaVA's to f32, normalised, the others to uint8."""
    ours, theirs = SaisaImageProcessor(**CLIP, image_aspect_ratio=aspect_ratio), CLIPImageProcessor(**CLIP)

    def llava(file: Path) -> Tensor:
        image = Image.open(file).convert("RGB")
        if aspect_ratio == "pad":
            image = expand_to_square(image, tuple(int(value * 255) for value in CLIP_MEAN))
        return theirs.preprocess(image, return_tensors="pt")["pixel_values"][0]

    def bare(file: Path) -> Tensor:
        image: Any = decode_jpeg(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8), ImageReadMode.RGB)
        return resize(image, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)

    return {
        FAST: lambda file: decode_image(file.read_bytes(), ours, exact=False),
        EXACT: lambda file: decode_image(file.read_bytes(), ours, exact=True),
        LLAVA: llava,
        BARE: bare,
    }


def measure(ways: dict[str, Callable[[Path], Tensor]], files: list[Path], num_rounds: int) -> dict[str, np.ndarray]:
    """Returns the CPU seconds that each way takes for all files, f64[num_rounds]; a first round is not counted."""
    seconds = {name: np.zeros(num_rounds + 1) for name in ways}
    generator = np.random.default_rng(0)  # for the order: the one after LLaVA's finds the caches full of other things
    for number in range(num_rounds + 1):
        for file in files:
            for name in generator.permutation(list(ways)):
                started = time.process_time()
                ways[name](file)
                seconds[name][number] += time.process_time() - started
    return {name: values[1:] for name, values in seconds.items()}


def difference(ways: dict[str, Callable[[Path], Tensor]], files: list[Path]) -> dict[str, float]:
    """Returns how far the fast pixels are from the exact ones, in units of 1/255."""
    gaps = torch.stack([(ways[FAST](file).int() - ways[EXACT](file).int()).abs() for file in files])
    worst = gaps.flatten(1).float().mean(1).max()
    found = {"largest": gaps.max(), "mean": gaps.float().mean(), "worst_photo_mean": worst}
    return {name: float(value) for name, value in found.items()} | {
        f"at_least_{levels}_fraction": float((gaps >= levels).float().mean()) for levels in (1, 2)
    }


def check_photos(folder: Path) -> list[Path]:
    """Returns the photos of a folder, all of which must be plain JPEGs.

    Raises:
        ValueError: There are none, or others.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"--photos {folder} holds no .jpg files; give a folder with photos")
    for file in files:
        if not is_fast(file.read_bytes(), SaisaImageProcessor(**CLIP)):
            raise ValueError(
                f"{file} is no plain JPEG, which this benchmark is about; take it out of --photos {folder}"
            )
    return files


def main(
    photos: Annotated[Path, typer.Option(help="folder with JPEG photos")],
    rounds: Annotated[int, typer.Option(help="times that each photo is decoded in each way", min=1)] = 25,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here too")] = None,
) -> None:
    """Measure image decoding on one core."""
    torch.set_num_threads(1)
    files, found, console = check_photos(photos), {}, build_console()
    for aspect_ratio in ("pad", "square"):
        ways = paths(aspect_ratio)
        seconds = measure(ways, files, rounds)
        gaps = difference(ways, files)
        table = Table("image_aspect_ratio: " + aspect_ratio, "ms an image", "SAISA is faster by (quartiles)")
        found[aspect_ratio] = {"difference": gaps, "ways": {}}
        for name, values in seconds.items():
            low, ratio, high = np.quantile(values / seconds[FAST], (0.25, 0.5, 0.75))
            each = float(np.median(values)) / len(files) * 1e3
            table.add_row(name, f"{each:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
            found[aspect_ratio]["ways"][name] = {"ms_per_image": each, "saisa_speedup": float(ratio)}
        console.print(table)
        console.print("fast against exact, in 1/255:", {name: float(f"{value:.2g}") for name, value in gaps.items()})
    if json_file:
        json_file.write_text(json.dumps(found | {"num_photos": len(files), "rounds": rounds}, indent=1))


if __name__ == "__main__":
    run(main)
