"""A zip's directory is read as Python's `zipfile` reads it, and damage in it is an error."""

import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from data_prep.row_shapes import Refused
from data_prep.zip_images import END, HEADER, ZipDirectory, read_member


def read_all(path: Path) -> dict[str, bytes]:
    """Returns what `zipfile` reads of every member by name, after seeing that we find and read the same."""
    directory, contents = ZipDirectory(path), {}
    with zipfile.ZipFile(path) as zipped:
        for name in zipped.namelist():
            slot, info = directory.find(name), zipped.getinfo(name)
            assert (slot is None) == info.is_dir(), name
            if slot:
                expected = (info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                assert tuple(slot) == expected, name
                contents[name] = zipped.read(name)
                assert read_member(str(path), name, slot) == contents[name]
    assert len(directory.crcs) == sum(not info.is_dir() for info in zipped.infolist())
    return contents


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_random_zips_are_read_like_zipfile_reads_them(tmp_path: Path, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path / "random.zip"
    path.write_bytes(chance.randbytes(chance.choice([0, 0, 777])))  # in front of the zip, as of one that unpacks itself
    names = [f"{'deep/' * (i % 3)}{chance.choice(['image', 'caf\u00e9', '\u56fe'])}-{i}.jpg" for i in range(30)]
    with zipfile.ZipFile(path, "a") as zipped:
        for name in [*names, *chance.choices(names, k=5), "deep/", "deep/empty/"]:
            info = zipfile.ZipInfo(name)
            info.compress_type = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            info.comment = chance.randbytes(chance.choice([0, 9]))
            info.extra = chance.choice([b"", b"\x99\x99\4\0abcd", b"\x99\x99\0\0odd"])
            with zipped.open(info, "w", force_zip64=chance.random() < 0.3) as member:
                member.write(b"" if name.endswith("/") else chance.randbytes(chance.randrange(400)) * 2)
        zipped.comment = chance.choice([b"", b"a comment", bytes(65535)])
    assert read_all(path).keys() == set(names)


def test_the_last_of_a_name_counts_and_names_of_one_checksum_are_told_apart(tmp_path: Path) -> None:
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("plumless", b"old")
        zipped.writestr("plumless/", b"")
        zipped.writestr("buckeroo", b"other")
        with pytest.warns(UserWarning, match="Duplicate name"):
            zipped.writestr("plumless", b"new")
    assert read_all(tmp_path / "a.zip") == {"plumless": b"new", "buckeroo": b"other"}
    directory = ZipDirectory(tmp_path / "a.zip")
    assert [directory.find(name) for name in ("plumless/", "plumles", "", "./plumless")] == [None] * 4


def test_a_zip_of_many_members_takes_zip64_and_little_memory(tmp_path: Path) -> None:
    path, num_members = tmp_path / "many.zip", 70_000
    with zipfile.ZipFile(path, "w") as zipped:
        for i in range(num_members):
            zipped.writestr(zipfile.ZipInfo(f"train2017/{i:012d}.jpg"), b"")
    assert path.read_bytes()[-42:-38] == b"PK\6\7"
    tracemalloc.start()
    directory = ZipDirectory(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes / num_members < 150
    with zipfile.ZipFile(path) as zipped:
        for i in (0, 1, 65_535, num_members - 1):
            slot = directory.find(name := f"train2017/{i:012d}.jpg")
            assert slot and slot.header_offset == zipped.getinfo(name).header_offset
    assert directory.find(f"train2017/{num_members:012d}.jpg") is None


def edited(path: Path, place: int, data: bytes) -> Path:
    """Returns the path of a zip after its bytes at a place have been changed."""
    path.write_bytes(path.read_bytes()[:place] + data + path.read_bytes()[place + len(data) :])
    return path


@pytest.fixture
def one(tmp_path: Path) -> tuple[Path, int]:
    """A zip of one member, whose extra field has room for a zip64 field, and the place of its directory."""
    info, path = zipfile.ZipInfo("caf\u00e9.jpg"), tmp_path / "one.zip"
    info.extra = struct.pack("<HH", 0x9999, 24) + bytes(24)
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(info, b"content")
    return path, zipped.start_dir


def test_numbers_beyond_32_bits_come_from_the_extra_field(one: tuple[Path, int]) -> None:
    path, start = one
    extra = start + HEADER.size + len("caf\u00e9.jpg".encode())
    edited(path, start + 20, b"\xff" * 8)  # both sizes
    edited(path, start + 42, b"\xff" * 4)  # offset of the header
    edited(path, extra, struct.pack("<HHQQQ", 1, 24, 5 << 32, 6 << 32, 7 << 32))
    directory = ZipDirectory(path)
    directory.file_bytes = 14 << 32
    slot = directory.find("caf\u00e9.jpg")
    assert slot and (slot.num_bytes, slot.num_stored_bytes, slot.header_offset) == (5 << 32, 6 << 32, 7 << 32)
    directory.file_bytes = (13 << 32) - 1
    assert_damaged(path, directory)
    edited(path, extra, struct.pack("<HHQQ", 1, 16, 5, 6) + struct.pack("<HH", 0x9999, 4))  # too short
    assert_damaged(path, ZipDirectory(path))


def assert_damaged(path: Path, directory: ZipDirectory, name: str = "caf\u00e9.jpg") -> None:
    slot = directory.find(name)
    with pytest.raises(Refused, match="zip member is damaged: what the zip's directory says of it cannot be"):
        assert slot and read_member(str(path), name, slot)


def test_a_member_larger_than_its_bytes_can_become_is_not_unpacked(one: tuple[Path, int]) -> None:
    path, start = one
    assert_damaged(path, ZipDirectory(edited(path, start + 24, struct.pack("<L", 8))))  # stored, of 7 bytes
    edited(path, start + 10, struct.pack("<H", zipfile.ZIP_DEFLATED))
    assert_damaged(path, ZipDirectory(edited(path, start + 24, struct.pack("<L", 7 * 1032 + 1))))
    slot = ZipDirectory(edited(path, start + 24, struct.pack("<L", 7 * 1032))).find("caf\u00e9.jpg")
    assert slot and slot.num_bytes == 7 * 1032


def test_names_are_cp437_unless_the_zip_says_otherwise(one: tuple[Path, int]) -> None:
    path, start = one
    raw, extra = "caf\u00e9.jpg".encode(), start + HEADER.size + len("caf\u00e9.jpg".encode())
    edited(path, start + 8, b"\0\0")  # without the flag for UTF-8
    with zipfile.ZipFile(path) as zipped:
        assert zipped.namelist() == [raw.decode("cp437")]
    directory = ZipDirectory(path)
    assert directory.find(raw.decode("cp437")) and directory.find("caf\u00e9.jpg") is None
    name = "caf\u00e9-\u56fe-of-me.jpg"
    edited(path, extra, struct.pack("<HHBL", 0x7075, 24, 1, zlib.crc32(raw)) + name.encode())
    assert ZipDirectory(path).find(name)
    edited(path, extra + 5, b"\0")  # the name that this one replaces is another
    assert ZipDirectory(path).find(raw.decode("cp437")) and not ZipDirectory(path).find(name)


def test_an_encrypted_member_is_known_by_its_method(one: tuple[Path, int]) -> None:
    path, start = one
    slot = ZipDirectory(edited(path, start + 8, b"\1\x08")).find("caf\u00e9.jpg")
    assert slot and slot.method == -1


def test_a_cut_zip_is_refused_and_a_damaged_one_refused_or_searched(one: tuple[Path, int]) -> None:
    path, start = one
    whole, chance = path.read_bytes(), random.Random(0)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"one\.zip is not a readable zip file"):
            ZipDirectory(path)
    path.write_bytes(whole[1:])
    with pytest.raises(ValueError, match="1 bytes of it are missing"):
        ZipDirectory(path)
    for place in range(start, len(whole)):
        edited(path, 0, whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        try:
            ZipDirectory(path).find("caf\u00e9.jpg")
        except ValueError as error:
            assert "is not a readable zip file" in str(error)


@pytest.mark.parametrize("place", [0, 28, 30, 32])
def test_a_directory_whose_headers_do_not_follow_one_another_is_damaged(one: tuple[Path, int], place: int) -> None:
    """Its signature, and the lengths of name, extra field and comment."""
    path, start = one
    with pytest.raises(ValueError, match=r"one\.zip is not a readable zip file \(.*\); give a folder or a zip"):
        ZipDirectory(edited(path, start + place, b"\xf0"))


def test_an_empty_zip_and_an_empty_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert (tmp_path / "empty.zip").stat().st_size == END.size
    assert ZipDirectory(tmp_path / "empty.zip").find("a.jpg") is None
    (tmp_path / "none.zip").touch()
    with pytest.raises(ValueError, match=r"none\.zip is not a readable zip file \(it does not end like one\)"):
        ZipDirectory(tmp_path / "none.zip")


@pytest.mark.parametrize("field", ["size", "stored", "offset"])
def test_a_member_that_ends_beyond_the_zip_is_damaged(tmp_path: Path, field: str) -> None:
    """Numbers that no file has, as zip64 may write them: they ended the run."""
    info = zipfile.ZipInfo("a.png")
    huge = {"size": 0, "stored": 0, "offset": 0} | {field: (1 << 63) + 5}
    extra = struct.pack("<HHQQQ", 1, 24, *huge.values())
    header = struct.pack("<4s4xHH4xLLLHHH8xL", b"PK\1\2", 0, 0, 0, *(2**32 - 1,) * 2, 5, len(extra), 0, 2**32 - 1)
    directory = header + info.filename.encode() + extra
    end = struct.pack("<4s4xHHLLH", b"PK\5\6", 1, 1, len(directory), 0, 0)
    (tmp_path / "a.zip").write_bytes(directory + end)
    assert_damaged(tmp_path / "a.zip", ZipDirectory(tmp_path / "a.zip"), "a.png")
