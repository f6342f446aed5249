"""Sound pixels are read whatever stands around them, in every format that Pillow decodes, and bombs are not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from webdataset.autodecode import IMAGE_EXTENSIONS

from common import tokens
from common.images import EXCLUDED_FORMATS, ImageError, formats, load_image, without_texts
from data_prep.image_check import WEBDATASET_EXTENSIONS, ImageInfo, check_image
from model.hf import image_loading_saisa, processing_saisa

PIXELS = Image.effect_noise((30, 20), 90).convert("RGB")
LONG = b"all work and no play " * 150_000  # 3 MB, which Pillow does not unpack


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_chunk(png: bytes, kind: bytes, content: bytes, before: bytes) -> bytes:
    place = png.index(before) - 4
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:place] + chunk + png[place:]


PLAIN = encoded(PIXELS, "PNG")
LOADED = {
    "profile": with_chunk(PLAIN, b"iCCP", b"name\0\0" + zlib.compress(LONG), b"IDAT"),
    "zTXt": with_chunk(PLAIN, b"zTXt", b"Comment\0\0" + zlib.compress(LONG), b"IDAT"),
    "iTXt": with_chunk(PLAIN, b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG), b"IDAT"),
    "after the pixels": with_chunk(PLAIN, b"zTXt", b"Comment\0\0" + zlib.compress(LONG), b"IEND"),
}


@pytest.mark.parametrize("name", LOADED)
def test_pixels_behind_a_long_text_or_profile_are_those_of_the_file_without(name: str) -> None:
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(LOADED[name])).load()
    assert check_image(LOADED[name], "a.png") == ("PNG", 30, 20)
    assert np.array_equal(np.asarray(load_image(LOADED[name])), np.asarray(PIXELS))
    assert without_texts(LOADED[name]) == PLAIN
    for end in (40, len(PLAIN) // 2):
        with pytest.raises(ImageError):
            load_image(LOADED[name][:end])


def test_nothing_else_of_a_png_is_touched() -> None:
    clear = encoded(PIXELS.convert("P"), "PNG", transparency=3, dpi=(72, 72), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert without_texts(clear) is clear
    texts = PngImagePlugin.PngInfo()
    texts.add_text("key", "value")
    assert without_texts(encoded(PIXELS, "PNG", pnginfo=texts)) == PLAIN
    for damaged in (PLAIN[:10], PLAIN[:8] + b"\xff" * 40, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        assert without_texts(damaged) == damaged


@pytest.mark.parametrize("kind", sorted(set(formats()) & Image.SAVE.keys()))
def test_what_pillow_decodes_is_an_image(kind: str) -> None:
    image = next(image for image in (PIXELS, PIXELS.convert("P"), PIXELS.convert("1")) if can_save(image, kind))
    info = check_image(encoded(image, kind), "lies.txt")
    assert info.format == kind and load_image(encoded(image, kind)).size == (info.width, info.height)
    assert "." not in info.extension and info.extension != "json"


def can_save(image: Image.Image, kind: str) -> bool:
    try:
        return bool(encoded(image, kind))
    except (OSError, ValueError):
        return False


def test_a_small_icon_may_hold_a_bomb() -> None:
    png = bytearray(PLAIN)
    png[16:24] = struct.pack(">II", 14000, 13000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    for data in (bytes(png), icon):
        with pytest.raises(ImageError, match="more than 178956970 pixels"):
            load_image(data)


@pytest.mark.parametrize("kind", sorted(EXCLUDED_FORMATS & Image.SAVE.keys()))
def test_what_would_start_a_program_or_is_never_decoded_is_no_image(kind: str) -> None:
    assert kind not in formats()
    if can_save(PIXELS, kind):
        with pytest.raises(ImageError, match="not an image"):
            load_image(encoded(PIXELS, kind))


def test_exported_folders_exclude_the_same_formats() -> None:
    assert image_loading_saisa.EXCLUDED_FORMATS == EXCLUDED_FORMATS


def test_extensions_that_webdataset_takes_for_images_are_those_of_its_source() -> None:
    ours = {ImageInfo(kind, 1, 1).extension for kind in formats()}
    assert ours & set(IMAGE_EXTENSIONS) == WEBDATASET_EXTENSIONS
    assert {"avif", "qoi"} <= ours - WEBDATASET_EXTENSIONS


def test_the_mark_of_an_image_is_one_here_and_in_exported_folders() -> None:
    assert tokens.IMAGE_TOKEN == processing_saisa.IMAGE_TOKEN
