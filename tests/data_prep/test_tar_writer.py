"""Tar bytes depend on names and contents alone, and the standard library reads them back."""

import hashlib
import io
import tarfile

from data_prep.tar_writer import END_OF_ARCHIVE, member_bytes, tar_sample

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
