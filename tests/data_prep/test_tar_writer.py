"""Tar bytes depend on names and contents alone, and the standard library reads them back."""

import hashlib
import io
import tarfile

import pytest

from data_prep.tar_writer import END_OF_ARCHIVE, member_bytes, tar_header, tar_sample

MEMBERS = [("json", b"{}"), ("0.jpg", b"x" * 512), ("1.png", b"y" * 513), ("2.gif", b"")]


def test_bytes_are_the_same_everywhere_for_ever() -> None:
    blocks = tar_sample("000000042", MEMBERS)
    assert len(blocks) == sum(member_bytes(len(content)) for _, content in MEMBERS) == 512 * (2 + 2 + 3 + 1)
    assert hashlib.sha256(blocks).hexdigest() == "792dbaa01e782c914e2caf7aeb1714f766068cf1c4627870e7f7241ed2e28634"


def test_members_in_order_with_fixed_owner_time_and_mode() -> None:
    archive = tar_sample("000000042", MEMBERS) + tar_sample("000000043", MEMBERS[:1]) + END_OF_ARCHIVE
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        infos = tar.getmembers()
        contents = [tar.extractfile(info).read() for info in infos]  # type: ignore[union-attr]
    names = ["000000042.json", "000000042.0.jpg", "000000042.1.png", "000000042.2.gif", "000000043.json"]
    assert [info.name for info in infos] == names
    assert contents == [content for _, content in MEMBERS] + [b"{}"]
    facts = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode, info.type) for info in infos}
    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
    assert archive[257:265] == b"ustar\x0000"


@pytest.mark.parametrize("name", ["a", "000000042.json", "999999999.12.webp", "k" * 96 + ".jpg", "caf\u00e9.jpg"])
@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 62_829, 8**11 - 1])
def test_headers_are_those_of_tarfile(name: str, num_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    assert tar_header(name, num_bytes) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "num_bytes"), [("k" * 101, 0), ("\u00e9" * 51, 0), ("a", 8**11)])
def test_what_a_header_cannot_hold_is_not_cut_short(name: str, num_bytes: int) -> None:
    with pytest.raises(AssertionError, match="do not fit USTAR"):
        tar_header(name, num_bytes)
