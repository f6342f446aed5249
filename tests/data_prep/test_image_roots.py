"""Images are found and read alike in folders and zips, under one root or several."""

import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from common.console import UsageError
from common.images import MAX_IMAGE_BYTES
from data_prep.image_check import check_image
from data_prep.image_roots import open_images, read_image
from data_prep.row_shapes import Refused

CPU = "/sys/devices/system/cpu/online"


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


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
    folder, zipped = open_images([str(tmp_path / "folder")]), open_images([str(archive)])
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
    images = open_images([str(archive)])
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
    entry = open_images([str(tmp_path)]).find("a.png")
    assert entry
    (tmp_path / "a.png").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"a\.png changed while it was being sharded"):
        read_image(entry)


def test_neither_folder_nor_zip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is not a readable zip file"):
        open_images([str(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match="is not there"):
        open_images([str(tmp_path / "none")])
    (tmp_path / "cut.zip").write_bytes(b"PK\5\6" + b"\xff" * 18)
    with pytest.raises(ValueError, match=r"cut\.zip is not a"):
        open_images([str(tmp_path / "cut.zip")])


def test_several_roots_are_asked_in_order_and_names_are_prefixes(tmp_path: Path) -> None:
    for name in ("plain/coco/1.jpg", "coco/1.jpg", "second/2.jpg", "second/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with zipfile.ZipFile(tmp_path / "vg.zip", "w") as zipped:
        zipped.writestr("VG/3.jpg", b"zipped")
    places = ["coco=coco", "coco=second", "vg/deep=vg.zip", "./plain"]
    images = open_images([place.replace("=", f"={tmp_path}/").replace("./", f"{tmp_path}/") for place in places])

    def content(path: str) -> bytes | None:
        entry = images.find(path)
        assert entry is None or (entry.path, entry.found_as) == (path, None)
        return entry and read_image(entry)

    assert content("coco/1.jpg") == b"coco/1.jpg"  # not second/1.jpg, not plain/coco/1.jpg
    assert content("./coco//2.jpg") == b"second/2.jpg"
    assert content("vg/deep/VG/3.jpg") == b"zipped"
    assert [content(path) for path in ("1.jpg", "vg/VG/3.jpg", "cocoa/1.jpg", "coco")] == [None] * 4
    assert open_images([f"{tmp_path}/plain"]).find("coco/1.jpg")


def test_an_image_is_found_under_another_extension_and_that_is_told(tmp_path: Path) -> None:
    for name in ("ocr/1.gif", "ocr/2.PNG", "ocr/3.png", "ocr/3.jpg", "ocr/4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    images = open_images([f"ocr={tmp_path}/ocr"])
    found = {}
    for number in range(1, 5):
        entry = images.find(f"ocr/{number}.jpg")
        found[number] = entry and (entry.path, entry.found_as, read_image(entry))
    assert found == {
        1: ("ocr/1.jpg", "ocr/1.gif", b"ocr/1.gif"),
        2: ("ocr/2.jpg", "ocr/2.PNG", b"ocr/2.PNG"),
        3: ("ocr/3.jpg", None, b"ocr/3.jpg"),
        4: None,
    }


def test_a_member_whose_extra_field_is_long_is_read_in_full(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        info = zipfile.ZipInfo("a.bin")
        info.extra = b"\x99\x99" + (4000).to_bytes(2, "little") + bytes(4000)
        zipped.writestr(info, b"content" * 100)
    entry = open_images([str(tmp_path / "a.zip")]).find("a.bin")
    assert entry and read_image(entry) == b"content" * 100


CAFE = {"NFC": "caf\u00e9.png", "NFD": "cafe\u0301.png"}


@pytest.mark.parametrize(("there", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("kind", ["folder", "zip", "zip without a flag"])
def test_the_other_unicode_form_of_a_name_is_found_and_told(tmp_path: Path, there: str, asked: str, kind: str) -> None:
    name, root = CAFE[there], tmp_path / ("images" if kind == "folder" else "images.zip")
    if kind == "folder":
        root.mkdir()
        (root / name).write_bytes(b"bytes")
    else:
        with zipfile.ZipFile(root, "w") as zipped:
            zipped.writestr(name, b"bytes")
    if kind == "zip without a flag":  # as macOS writes it
        data = bytearray(root.read_bytes())
        for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            data[data.index(signature) + place + 1] &= ~8
        root.write_bytes(data)
    images = open_images([str(root)])
    for path, told in ((CAFE[asked], name), (name, None), (CAFE[asked].replace("png", "jpg"), name)):
        entry = images.find(path)
        assert entry and (entry.path, entry.found_as, read_image(entry)) == (path, told, b"bytes")


def test_what_follows_a_dot_is_not_always_an_extension(tmp_path: Path) -> None:
    for name in ("2401.jpg", "2401.00003.png", "plain.jpg"):
        (tmp_path / name).write_bytes(b"x")
    found = [open_images([str(tmp_path)]).find(path) for path in ("2401.00001", "2401.00003.jpeg", "plain", "2401.JPG")]
    assert [entry and entry.found_as for entry in found] == [None, "2401.00003.png", "plain.jpg", "2401.jpg"]
    assert found[0] is None


def test_loops_and_files_of_others_are_refused_alone(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "loop1.jpg").symlink_to("loop2.jpg")
    (tmp_path / "loop2.jpg").symlink_to("loop1.jpg")
    (tmp_path / "mine.jpg").write_bytes(b"x")
    images = open_images([str(tmp_path)])
    with pytest.raises(Refused, match=r"^image cannot be read: Too many levels of symbolic links$") as raised:
        images.find("loop1.jpg")
    assert (raised.value.kind, raised.value.file) == ("image_unreadable", "loop1.jpg")
    entry = images.find("mine.jpg")
    assert entry

    def forbid(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", forbid)
    with pytest.raises(Refused, match="Permission denied"):
        images.find("mine.jpg")
    monkeypatch.setattr("builtins.open", forbid)
    with pytest.raises(Refused, match="Permission denied"):
        read_image(entry)


def test_a_folder_with_an_equals_sign_is_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/run=3/imgs/a.png", "3/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert open_images(["data/run=3/imgs"]).find("a.png")
    with pytest.raises(UsageError, match=r"write \./data/run=3 for the first, or data/run=\./3"):
        open_images(["data/run=3"])
    assert open_images(["./data/run=3"]).find("imgs/a.png")
    assert open_images(["data/run=./3"]).find("data/run/b.png")


def test_names_are_utf8_in_every_locale(tmp_path: Path) -> None:
    (tmp_path / "\u56fe.png").write_bytes(b"bytes")
    code = (
        "from data_prep.image_roots import open_images, read_image; import sys;"
        "entry = open_images(sys.argv[1:]).find('\\u56fe.png'); print(sys.getfilesystemencoding(), read_image(entry))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert told.stdout == "ascii b'bytes'\n", told.stderr


def test_what_is_no_file_of_a_disk_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    """Links into /proc and /sys lead to files of size 0 or 4,096 that hold something else, or wait for a reader."""
    os.mkfifo(tmp_path / "pipe.png")
    for name, target in (("zero", "/dev/zero"), ("mem", "/proc/self/mem"), ("kmsg", "/proc/kmsg"), ("cpu", CPU)):
        (tmp_path / f"{name}.png").symlink_to(target)
    images = open_images([str(tmp_path)])
    assert images.find("pipe.png") is None and images.find("zero.png") is None
    for name in ("mem", "kmsg"):
        entry = images.find(f"{name}.png")
        assert entry and read_image(entry) == b""
    entry = images.find("cpu.png")
    with pytest.raises(Refused, match="its size is not that of its bytes"):
        assert entry and read_image(entry)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(Refused, match="a file of 2,147,483,649 bytes, more than 2,147,483,648"):
        open_images([str(tmp_path)]).find("a.png")
