"""The two ways to read shards are told apart when they differ, and only then."""

import os
from shutil import copytree

import pytest

from pipeline.shards.compare import by_webdataset, check, compare
from pipeline.shards.shard_set import ShardSet
from tests.s3_server import Bucket
from tests.shard_sets import NUM_SAMPLES


def test_equal_shards(shard_folder, tmp_path, s3: Bucket):
    same = f"{NUM_SAMPLES} of {NUM_SAMPLES} samples, the same by number and through webdataset"
    assert check(ShardSet(shard_folder)) == f"{shard_folder}: {same}"
    s3.upload(shard_folder, "shards")
    assert check(ShardSet(f"{s3.url}/shards", tmp_path)) == f"{s3.url}/shards: {same}"
    assert check(ShardSet(shard_folder), limit=7).startswith(f"{shard_folder}: 7 of {NUM_SAMPLES} samples")


def test_damage_that_webdataset_does_not_tell(shard_folder, tmp_path):
    """It takes zeros for the end of a tar and goes on with the next one."""
    folder = copytree(shard_folder, tmp_path / "shards")
    shards = ShardSet(folder)
    tar, offset = folder / "shard-000000.tar", shards.readers[0].load().offsets[1]
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size - offset))
    assert len(list(by_webdataset(shards))) == NUM_SAMPLES - shards.shard_sizes[0] + 1
    with pytest.raises(ValueError, match=r"shard-000000.tar: sample 1 \(key .*\) is damaged"):
        check(shards)


def test_damage_that_webdataset_tells(shard_folder, tmp_path):
    folder = copytree(shard_folder, tmp_path / "shards")
    os.truncate(folder / "shard-000000.tar", 3000)
    with pytest.raises(ValueError, match="webdataset cannot read it: "):
        list(by_webdataset(ShardSet(folder)))


def test_differences_are_named():
    sample = ("7", {"json": b"{}", "jpg": b"abc"})
    assert compare(sample, sample) is None
    assert compare(sample, None) == "only reading by number has it"
    assert compare(None, sample) == "only webdataset has it"
    assert compare(sample, ("8", sample[1])) == "key 7 by number, 8 through webdataset"
    assert compare(sample, ("7", {"json": b"{}"})) == (
        "key 7: members ['json', 'jpg'] by number, ['json'] through webdataset"
    )
    assert compare(sample, ("7", {"json": b"{}", "jpg": b"abd"})) == "key 7: the bytes of jpg differ"
