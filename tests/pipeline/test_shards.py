"""Reading by number gives what plain webdataset gives in order."""

import json

import pytest
from webdataset.compat import WebDataset

from pipeline.shards import ShardSet


def test_samples_by_number_are_the_samples_of_the_tars(world):
    shards = ShardSet(world.root / "shards")
    tars = sorted(str(tar) for tar in (world.root / "shards").glob("*.tar"))
    expected = list(WebDataset(tars, shardshuffle=False))
    assert len(shards) == len(expected) == sum(shards.shard_sizes)
    for number in (0, 1, len(shards) - 1):
        members = {name: data for name, data in expected[number].items() if not name.startswith("__")}
        assert shards.members(number) == members
        assert shards.record(number) == json.loads(members["json"])


def test_unfinished_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no finished shards here \(no manifest.json\); run `make shards"):
        ShardSet(tmp_path)


def test_a_tar_that_is_cut_short_is_named(world, tmp_path):
    for file in (world.root / "shards").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tar = tmp_path / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    shards = ShardSet(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000.tar: sample \d+ is cut short"):
        shards.members(len(shards) - 1)
    data = bytearray(tar.read_bytes())
    data[shards.readers[0].sidecar["offsets"][1] - 700] ^= 1  # one bit of the first sample
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000.tar: sample 0 is damaged"):
        shards.members(0)
