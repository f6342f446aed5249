"""Pixels against transformers' own processors, and every kind of image file against what a viewer shows."""

import ast
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import normalize, rescale

from model.hf import image_processing_saisa
from model.hf.image_processing_saisa import CLIP_MEAN, CLIP_STD, SaisaImageProcessor, to_rgb
from tests.transformers_versions import CLIPImageProcessor, SiglipImageProcessor

CODE = Path(image_processing_saisa.__file__).parent
CLIP_336: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SIGLIP_384: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
}
MEAN_COLOUR = (122, 116, 104)


def pixels(processor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def padded(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square, written in another way than the code under test does it."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    return ImageOps.expand(image, (left, top, side - image.width - left, side - image.height - top), colour)


def test_clip_pixels_of_photos_equal_transformers(realdata: Path):
    theirs, square = CLIPImageProcessor(**CLIP_336), SaisaImageProcessor(**CLIP_336)
    pad = SaisaImageProcessor(**CLIP_336, image_aspect_ratio="pad")
    files = sorted((realdata / "coco_photos" / "images").iterdir())
    assert len(files) == 39
    for file in files:
        image = Image.open(file).convert("RGB")
        assert torch.equal(pixels(square, Image.open(file)), pixels(theirs, image)), file.name
        assert torch.equal(pixels(pad, Image.open(file)), pixels(theirs, padded(image, MEAN_COLOUR))), file.name


def test_siglip_pixels_of_photos_equal_transformers(realdata: Path):
    theirs, square = SiglipImageProcessor(**SIGLIP_384), SaisaImageProcessor(**SIGLIP_384)
    pad = SaisaImageProcessor(**SIGLIP_384, image_aspect_ratio="pad")
    for file in sorted((realdata / "coco_photos" / "images").iterdir())[:6]:
        image = Image.open(file).convert("RGB")
        assert torch.equal(pixels(square, image), pixels(theirs, image)), file.name
        assert torch.equal(pixels(pad, image), pixels(theirs, padded(image, (127, 127, 127)))), file.name


def test_normalize_equals_transformers_for_every_level():
    levels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3)
    theirs = normalize(rescale(levels, 1 / 255), CLIP_MEAN, CLIP_STD, input_data_format="channels_first")
    ours = SaisaImageProcessor().normalize(torch.from_numpy(levels))
    assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), theirs)
    batch = torch.from_numpy(levels).expand(2, 3, 16, 16)
    assert torch.equal(SaisaImageProcessor().normalize(batch)[1], ours)


def test_two_stages_equal_one(noise):
    processor = SaisaImageProcessor(**CLIP_336, image_aspect_ratio="pad")
    levels = processor.resize_to_uint8(noise)
    assert levels.dtype == torch.uint8 and levels.shape == (3, 336, 336)
    assert torch.equal(processor.normalize(levels), pixels(processor, noise)[0])
    assert torch.equal(pixels(processor, [noise, noise])[1], pixels(processor, np.asarray(noise))[0])


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))


def extrema(image: Image.Image) -> list[list[int]]:
    channels = np.asarray(image).reshape(-1, 3)
    return np.stack([channels.min(0), channels.max(0)], axis=1).tolist()


def test_awkward_files(realdata: Path):
    """The manifest says what Pillow's convert("RGB") gives; only transparency and 16 bits may differ from it."""
    folder = realdata / "awkward_images"
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    decoded, differing = 0, set()
    for entry in entries:
        file = folder / entry["file"]
        if not entry["decodes"]:
            with pytest.raises((OSError, Image.DecompressionBombError)):
                to_rgb(Image.open(file))
            continue
        decoded += 1
        with warnings.catch_warnings(action="ignore"):  # Pillow's own, about palettes with transparency
            plain = Image.open(file).convert("RGB")
            image = to_rgb(Image.open(file))
        assert image.mode == "RGB" and list(image.size) == entry["rgb_size"], file.name
        if image.tobytes() == plain.tobytes():
            assert extrema(image) == entry["rgb_extrema"], file.name
        else:
            differing.add(file.name)
    assert (len(entries), decoded) == (28, 21)
    assert differing == {
        "basn0g16.png",
        "i_trns.png",
        "p_trns_single.png",
        "pil123p.png",
        "transparent.png",
        "uncompressed_la.png",
    }


def test_sixteen_bit_file_is_not_white(realdata: Path):
    """basn0g16.png is a ramp; read with numpy it gives the levels that a viewer shows."""
    file = realdata / "awkward_images" / "pngsuite" / "basn0g16.png"
    levels = np.asarray(Image.open(file)).astype(np.int64)
    assert levels.max() > 60000
    assert np.array_equal(np.asarray(to_rgb(Image.open(file)))[..., 1], (levels + 128) // 257)
    assert np.asarray(Image.open(file).convert("RGB")).mean() > 250  # what LLaVA would see


def gray(values, mode: str) -> list[int]:
    image = Image.fromarray(np.array([values], dtype={"F": np.float32, "I": np.int32}.get(mode, np.uint16)))
    assert image.mode == mode
    return np.asarray(to_rgb(image))[0, :, 0].tolist()


def test_gray_of_many_bits():
    assert gray([0, 128, 129, 257, 32768, 65535], "I;16") == [0, 0, 1, 1, 128, 255]
    assert gray([0, 255, 257, 65535], "I") == [0, 1, 1, 255]
    assert gray([-100000, 0, 100000], "I") == [0, 128, 255]
    assert gray([0, 0.5, 1], "F") == [0, 128, 255]
    assert gray([0, 1, 100.4, 255], "F") == [0, 1, 100, 255]
    assert gray([0, 257, 65535], "F") == [0, 1, 255]
    assert gray([-1, 0, 1], "F") == [0, 128, 255]
    assert gray([-3, -3], "F") == [0, 0]
    assert gray([float("nan"), 1], "F") == [0, 255]


def test_big_endian_sixteen_bits_and_transparent_gray():
    big = Image.frombytes("I;16B", (2, 1), b"\x01\x01\xff\xff")
    assert np.asarray(to_rgb(big))[0, :, 0].tolist() == [1, 255]
    ramp = Image.fromarray(np.array([[0, 514, 65535]], np.uint16))
    ramp.info["transparency"] = 514
    assert np.asarray(to_rgb(ramp))[0, :, 0].tolist() == [0, 255, 255]


def test_transparency_is_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 127))
    assert to_rgb(half).getpixel((0, 0)) == (255, 128, 128)
    for mode, hidden in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0)), ("La", (0, 0)), ("RGBa", (0, 0, 0, 0))):
        assert to_rgb(Image.new(mode, (1, 1), hidden)).getpixel((0, 0)) == (255, 255, 255), mode
    opaque = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    opaque.putalpha(255)
    assert to_rgb(opaque).tobytes() == opaque.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_is_white(mode):
    image = Image.new(mode, (2, 1), 0)
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), (1, 1, 1) if mode == "RGB" else 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    seen = to_rgb(Image.open(file))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((1, 0)) == ((200, 0, 0) if mode == "P" else (1, 1, 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency_equal_convert(mode, noise):
    image = noise.convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_lab_becomes_srgb():
    """L in 0..255; a and b with 128 for none. sRGB red is (53.2, 80.1, 67.2) in CIE terms."""
    colours = [(255, 128, 128), (0, 128, 128), (136, 208, 195)]
    white, black, red = (np.asarray(to_rgb(Image.new("LAB", (1, 1), colour)))[0, 0] for colour in colours)
    assert white.min() >= 254 and black.max() <= 1
    assert red[0] > 240 and max(red[1:]) < 40


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    image = Image.open(file)
    image.seek(1)
    assert to_rgb(image).getpixel((4, 4)) == (255, 0, 0)


def test_exif_orientation_is_ignored(realdata: Path):
    file = realdata / "awkward_images" / "exif_orientation" / "Landscape_6.jpg"
    assert to_rgb(Image.open(file)).size == (1200, 1800)
    assert ImageOps.exif_transpose(Image.open(file)).size == (1800, 1200)


def test_centre_is_kept_and_padding_is_the_mean_colour():
    stripes = Image.new("RGB", (90, 30), "black")
    stripes.paste("white", (30, 0, 60, 30))
    small: dict[str, Any] = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    assert SaisaImageProcessor(**small).resize_to_uint8(stripes).min() == 255
    pad = SaisaImageProcessor(**small, image_aspect_ratio="pad").resize_to_uint8(stripes)
    assert pad[:, 0, 0].tolist() == list(MEAN_COLOUR) and pad[:, 15, 15].tolist() == [255] * 3


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_a_thin_line_does_not_fill_the_memory(ratio, monkeypatch, noise):
    """The way around a huge intermediate image gives nearly the same pixels; here it is taken for a small image."""
    processor = SaisaImageProcessor(**CLIP_336, image_aspect_ratio=ratio)
    exact = processor.resize_to_uint8(noise.resize((700, 400))).float()
    monkeypatch.setattr(image_processing_saisa, "MAX_INTERMEDIATE_PIXELS", 400 * 400)
    near = processor.resize_to_uint8(noise.resize((700, 400))).float()
    assert (exact - near).abs().mean() < 3
    assert processor.resize_to_uint8(Image.new("RGB", (1, 65500))).shape == (3, 336, 336)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, noise):
    first = SaisaImageProcessor(**SIGLIP_384, image_aspect_ratio="pad")
    first.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["image_aspect_ratio"], saved["size"], saved.get("crop_size")) == ("pad", SIGLIP_384["size"], None)
    second = SaisaImageProcessor.from_pretrained(tmp_path)
    assert second.to_dict() == first.to_dict()
    assert torch.equal(pixels(second, noise), pixels(first, noise))
    other = SaisaImageProcessor.from_pretrained(tmp_path, image_aspect_ratio="square")
    assert not torch.equal(pixels(other, noise), pixels(first, noise))
    with pytest.raises(ValueError, match="image_aspect_ratio='anyres'"):
        SaisaImageProcessor.from_pretrained(tmp_path, image_aspect_ratio="anyres")(noise)


def test_settings_of_encoders():
    old = {"size": 336, "crop_size": 336, "do_center_crop": True, "do_resize": True, "resample": 3}
    assert SaisaImageProcessor.from_encoder(old).to_dict() == SaisaImageProcessor(**CLIP_336).to_dict()
    new = SiglipImageProcessor(**SIGLIP_384).to_dict()
    made = SaisaImageProcessor.from_encoder(new, "pad")
    assert made.to_dict() == SaisaImageProcessor(**SIGLIP_384, image_aspect_ratio="pad").to_dict()
    assert made.output_size == (384, 384)
    assert SaisaImageProcessor.from_encoder(CLIPImageProcessor(**CLIP_336).to_dict()).output_size == (336, 336)
    with pytest.raises(ValueError, match="do_rescale=false is not supported"):
        SaisaImageProcessor.from_encoder(old | {"do_rescale": False})
    with pytest.raises(ValueError, match=r"rescale_factor=0\.1"):
        SaisaImageProcessor.from_encoder(old | {"rescale_factor": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' must be one of"),
        ({"size": {"longest_edge": 3}}, "must have the keys"),
        ({"size": {"shortest_edge": 3}}, "set crop_size"),
        ({"size": {"shortest_edge": 3}, "crop_size": {"height": 4, "width": 3}}, "must not exceed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SaisaImageProcessor(**settings)


def test_unknown_options_are_refused(noise):
    with pytest.raises(TypeError, match="do_resize"):
        SaisaImageProcessor()(noise, do_resize=False)


@pytest.mark.parametrize("file", sorted(CODE.glob("*_saisa.py")), ids=lambda file: file.stem)
def test_imports_only_what_a_user_of_an_exported_folder_has(file):
    tree = ast.parse(file.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    outside = {str(name).split(".")[0] for name in imported} - sys.stdlib_module_names
    assert outside <= {"numpy", "torch", "PIL", "transformers"}
    beside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert all((CODE / f"{name}.py").is_file() and str(name).endswith("_saisa") for name in beside), "shipped too"
