"""Images are found and read alike in folders and zips, and only what decodes in full is let through."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image, features

from data_prep.images import FORMATS, check_image, open_images, read_image
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


def test_zip_members_are_read_in_place_like_files(tmp_path: Path) -> None:
    contents = {"a.png": encoded("PNG"), "deep/caf\u00e9.bmp": encoded("BMP"), "empty.jpg": b""}
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for number, (name, data) in enumerate(contents.items()):
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(data)
            info = zipfile.ZipInfo(name)
            info.extra = b"\x99\x99\4\0abcd"  # the header is longer than its name
            zipped.writestr(info, data, [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED][number % 2])
    folder, zipped = open_images(tmp_path / "folder"), open_images(archive)
    for name, data in contents.items():
        for images in (folder, zipped):
            entry = images.find(f"./{name}")
            assert entry and entry.num_bytes == len(data) and read_image(entry) == data
    for images in (folder, zipped):
        assert images.find("b.png") is None and images.find("deep") is None and images.find("a.png/x") is None
        assert images.find("x" * 5000) is None


def test_damage_inside_a_zip_refuses_the_image_alone(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("stored.bmp", encoded("BMP"), zipfile.ZIP_STORED)
        zipped.writestr("deflated.bmp", encoded("BMP"), zipfile.ZIP_DEFLATED)
        zipped.writestr("lzma.bmp", encoded("BMP"), zipfile.ZIP_LZMA)
        zipped.writestr("whole.bmp", encoded("BMP"))
    data = bytearray(archive.read_bytes())
    images = open_images(archive)
    entries = {name: images.find(f"{name}.bmp") for name in ("stored", "deflated", "lzma", "whole")}
    for name in ("stored", "deflated"):
        entry = entries[name]
        assert entry and entry.slot
        data[entry.slot.header_offset + 500] ^= 1
    archive.write_bytes(data)
    reasons = {}
    for name, entry in entries.items():
        assert entry
        try:
            reasons[name] = check_image(read_image(entry), name).format
        except Refused as refused:
            reasons[name] = f"{refused.kind} {refused.file}: {refused}"
    assert reasons["stored"] == "zip_member stored.bmp: zip member is damaged: its checksum differs"
    assert reasons["deflated"].startswith("zip_member deflated.bmp: zip member is damaged")
    assert (
        reasons["lzma"] == "zip_member lzma.bmp: zip member is compressed by method 14; use stored or deflated members"
    )
    assert reasons["whole"] == "BMP"


def test_a_file_that_changed_since_it_was_found_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    entry = open_images(tmp_path).find("a.png")
    assert entry
    (tmp_path / "a.png").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"a\.png changed while it was being sharded"):
        read_image(entry)


def test_neither_folder_nor_zip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is not a zip file; give a folder or a zip"):
        open_images(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="is not there"):
        open_images(tmp_path / "none")
    (tmp_path / "cut.zip").write_bytes(b"PK\5\6" + b"\xff" * 18)
    with pytest.raises(ValueError, match=r"cut\.zip is not a"):
        open_images(tmp_path / "cut.zip")
