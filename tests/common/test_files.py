"""A file is whole under its name or not there at all."""

import errno
from pathlib import Path

import pytest

from common.files import remove_parts, whole_file, write_whole


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_whole(path, b"old")
    with pytest.raises(OSError) as raised, whole_file(path) as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(path) in str(raised.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_has_the_name_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with whole_file(path) as file, whole_file(path) as other:
        file.write(b"first")
        other.write(b"second")
        assert not path.exists() and len(list(tmp_path.glob("*.part"))) == 2
    assert path.read_bytes() == b"first"


def test_parts_of_the_dead_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.tar.123.part").touch()
    (tmp_path / "a.tar").touch()
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
