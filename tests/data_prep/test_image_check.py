"""Only what decodes in full is let through, and it is called what it is."""

import io
import json
import struct
import zlib
from functools import partial
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops, ImageStat, features

from data_prep.image_check import check_image, shrink_image
from data_prep.row_shapes import Refused


def encoded(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise(size, 90).convert(mode)
    noise.save(buffer, kind)
    return buffer.getvalue()


def too_large() -> bytes:
    """A PNG whose header promises 182 million pixels."""
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", 14000, 13000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "QOI"])
def test_format_size_and_extension_come_from_the_bytes(kind: str) -> None:
    info = check_image(encoded(kind), "lies.xyz")
    assert (info.format, info.width, info.height) == (kind, 40, 30)
    assert info.extension == {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(kind, kind.lower())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "QOI"])
def test_a_file_cut_short_is_refused_every_time(kind: str) -> None:
    data = encoded(kind)
    for _ in range(2):  # Pillow serves the partial pixels of an image whose load() has failed once
        with pytest.raises(Refused) as raised:
            check_image(data[: len(data) * 2 // 3], "a")
        assert raised.value.kind == "image_damaged"


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", "not_an_image", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not_an_image", "46 bytes, beginning 'version https://'"),
        (b"<html>404</html>", "not_an_image", "beginning '<html>404</html>'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image", "'%!PS-Adobe-3.0 E'"),
        (too_large(), "image_too_large", "more than 178956970 pixels"),
    ],
)
def test_refusals_name_what_was_found(data: bytes, kind: str, reason: str) -> None:
    with pytest.raises(Refused) as raised:
        check_image(data, "dir/a.jpg")
    assert (raised.value.kind, raised.value.file) == (kind, "dir/a.jpg")
    assert reason in str(raised.value)


def test_awkward_images_are_taken_or_refused_as_pillow_says(realdata: Path) -> None:
    folder = realdata / "awkward_images"
    facts = json.loads((folder / "manifest.json").read_text())["files"]
    assert len(facts) == 28 and features.check("webp")
    for fact in facts:
        data = (folder / fact["file"]).read_bytes()
        if fact["decodes"]:
            info = check_image(data, fact["file"])
            assert [info.format, [info.width, info.height]] == [fact["format"], fact["size"]], fact["file"]
            continue
        with pytest.raises(Refused) as raised:
            check_image(data, fact["file"])
        expected = {
            "cannot identify": ("not_an_image", "not an image that can be read"),
            "decompression bomb": ("image_too_large", "more than 178956970 pixels"),
            "": ("image_damaged", fact["error"].removeprefix("open: ")),
        }
        kind, reason = next(value for words, value in expected.items() if words in fact["error"])
        assert raised.value.kind == kind and reason in str(raised.value), fact["file"]


def test_the_header_alone_tells_what_it_is_and_lets_damage_pass() -> None:
    data = encoded("JPEG")
    assert check_image(data[: len(data) * 2 // 3], "a", decode=False) == ("JPEG", 40, 30)
    for broken in (b"<html>", too_large()):
        with pytest.raises(Refused):
            check_image(broken, "a", decode=False)


@pytest.mark.parametrize(
    ("kind", "mode", "kept_as", "kept_mode"),
    [
        ("JPEG", "RGB", "JPEG", "RGB"),
        ("JPEG", "L", "JPEG", "L"),
        ("JPEG", "CMYK", "JPEG", "RGB"),
        ("WEBP", "RGBA", "PNG", "RGBA"),
        ("PNG", "RGB", "PNG", "RGB"),
        ("PNG", "LA", "PNG", "RGBA"),
        ("GIF", "P", "PNG", "RGB"),
    ],
)
def test_a_large_image_shrinks_to_the_longest_side(kind: str, mode: str, kept_as: str, kept_mode: str) -> None:
    source = Image.linear_gradient("L").resize((200, 101)).convert("RGB").convert(mode)
    if "A" in mode:
        source.putalpha(Image.linear_gradient("L").resize((200, 101)))
    buffer = io.BytesIO()
    source.save(buffer, kind)
    data, info, before = shrink_image(buffer.getvalue(), "a", 50)
    assert (info, before) == ((kept_as, 50, 25), (kind, 200, 101))
    with Image.open(io.BytesIO(data)) as small:
        assert (small.format, small.size, small.mode) == (kept_as, (50, 25), kept_mode)
        expected = source.convert(kept_mode).resize((50, 25), Image.Resampling.BICUBIC)
        errors = ImageStat.Stat(ImageChops.difference(small, expected)).mean
        assert max(errors) < (0.01 if kind in ("PNG", "GIF") else 3)


def test_a_small_or_deep_image_is_kept_byte_for_byte() -> None:
    small, deep = encoded("PNG"), encoded("PNG", (90, 60), "I;16")
    assert shrink_image(small, "a", 40) == (small, ("PNG", 40, 30), ("PNG", 40, 30))
    assert shrink_image(deep, "a", 40)[0] == deep
    with pytest.raises(Refused):
        shrink_image(small[:200], "a", 40)


def test_a_jpeg_is_refused_when_and_only_when_it_does_not_decode_in_color():
    random = Random(0)
    stream = io.BytesIO()
    Image.effect_noise((80, 60), 60).convert("RGB").save(stream, "JPEG", quality=80)
    whole, outcomes = stream.getvalue(), set()
    for _ in range(400):
        data = bytearray(whole)
        if random.random() < 0.4:
            del data[random.randrange(len(data)) :]
        else:
            for _ in range(random.choice([1, 5, 40])):
                data[random.randrange(len(data))] = random.randrange(256)
        outcomes.add((accepts(partial(check_image, path="x"), bytes(data)), accepts(decode_in_color, bytes(data))))
    assert outcomes == {(True, True), (False, False)}


def accepts(decode, data: bytes) -> bool:
    try:
        decode(data)
    except Exception:
        return False
    return True


def decode_in_color(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")
