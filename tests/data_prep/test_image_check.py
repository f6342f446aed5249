"""Only what decodes in full is let through, and it is called what it is."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image, features

from data_prep.image_check import FORMATS, check_image
from data_prep.records import Refused


def encoded(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise(size, 90).convert(mode)
    noise.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_format_size_and_extension_come_from_the_bytes(kind: str) -> None:
    info = check_image(encoded(kind), "lies.xyz")
    assert (info.format, info.width, info.height) == (kind, 40, 30)
    assert info.extension == {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())


@pytest.mark.parametrize("kind", FORMATS)
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
        (encoded("PNG", (14000, 13000), "1"), "image_too_large", "more than 178956970 pixels"),
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
