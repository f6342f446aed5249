"""The sharding benchmark runs, and its three writers write the same photos and questions."""

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.shards import write
from benchmarks.shards.inputs import write_data_set
from data_prep.plan import Settings
from data_prep.shards import make_shards


def contents(folder: Path) -> list[tuple[bytes, list]]:
    """Returns (photo, conversations) of every sample in a folder of tars, sorted."""
    members: dict[str, bytes] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file and member.name not in members
                members[member.name] = file.read()
    keys = sorted({name.split(".")[0] for name in members})
    assert len(members) == 2 * len(keys)
    return sorted((members[f"{key}.jpg"], json.loads(members[f"{key}.json"])["conversations"]) for key in keys)


@pytest.mark.slow
def test_every_writer_writes_the_same_samples_and_the_table_is_told(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    with write.local_ray(2):
        write.main(num_samples=40, num_tars=2, rounds=1, cpus=2, json_file=numbers)
        data, images, num_bytes = write_data_set(tmp_path, [(64, 48)] * 20)
        make_shards(data, images, tmp_path / "ours", Settings(check="header"))
        write.write_with_ray_data(data, images, 2, tmp_path / "ray")
        write.write_with_webdataset(data, images, num_bytes, tmp_path / "webdataset")

    figures = {figure["what"]: figure for figure in json.loads(numbers.read_text())["figures"]}
    assert list(figures) == ["ours", "ray", "webdataset", "bytes of a photo", "ours / ray"]
    assert 40_000 < figures["bytes of a photo"]["value"] < 100_000
    ratio = figures["ours / ray"]
    expected = figures["ours"]["value"] / figures["ray"]["value"]
    assert abs(ratio["value"] / expected - 1) < 1e-9 and ratio["met"] == (expected >= 1.5)

    ours = contents(tmp_path / "ours")
    assert len(ours) == 20 and len({photo for photo, _ in ours}) == 20
    assert contents(tmp_path / "ray") == contents(tmp_path / "webdataset") == ours
