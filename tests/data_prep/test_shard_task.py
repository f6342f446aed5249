"""A shard is written whole, its sidecar finds and proves every sample, and only what verifies is kept."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep.image_roots import open_images
from data_prep.plan import Settings
from data_prep.shard_task import PlannedRow, ShardTask, write_shard
from data_prep.tar_writer import END_OF_ARCHIVE

TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]


@pytest.fixture
def task(tmp_path: Path) -> ShardTask:
    """Five rows with an image; the image of the fourth is damaged."""
    folder, rows = tmp_path / "images", []
    folder.mkdir()
    for i in range(5):
        Image.effect_noise((50, 40), 80).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:900])
    images = open_images([str(folder)])
    for i in range(5):
        entry = images.find(f"{i}.png")
        assert entry
        text = json.dumps({"id": f"row{i}", "image": f"{i}.png", "conversations": TURNS}).encode()
        rows.append(PlannedRow(f"{i + 100:09d}", i, text, (entry,)))
    (tmp_path / "out").mkdir()
    return ShardTask("shard-000007", tmp_path / "out", rows, Settings())


def test_the_sidecar_finds_and_proves_every_sample(task: ShardTask) -> None:
    summary = write_shard(task)
    tar, sidecar = task.tar.read_bytes(), json.loads(task.sidecar.read_bytes())
    assert (summary.num_samples, summary.num_images, summary.tar_bytes, summary.is_new) == (4, 4, len(tar), True)
    assert sidecar["keys"] == ["000000100", "000000101", "000000102", "000000104"]
    for key, offset, size, checksum in zip(
        *(sidecar[column] for column in ("keys", "offsets", "sizes", "checksums")), strict=True
    ):
        blocks = tar[offset : offset + size]
        assert blocks.startswith(f"{key}.json\0".encode()) and zlib.crc32(blocks) == checksum
        record = json.loads(blocks[512:].split(b"\0")[0])
        assert record["source_index"] == int(key) - 100 and record["images"][0]["member"] == "png"
    assert tar[sidecar["offsets"][-1] + sidecar["sizes"][-1] :] == END_OF_ARCHIVE
    (reject,) = summary.rejects
    assert (reject.index, reject.id, reject.file, reject.kind) == (3, "row3", "3.png", "image_damaged")
    assert sidecar["num_planned"] == 5 and sidecar["rejects"] == [reject._asdict()]


def test_a_second_run_keeps_what_is_there(task: ShardTask) -> None:
    first = write_shard(task)
    before = task.tar.stat().st_mtime_ns
    assert write_shard(task) == first._replace(is_new=False)
    assert task.tar.stat().st_mtime_ns == before


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda task: flip(task.tar, 700),
        lambda task: flip(task.tar, -1),
        lambda task: task.tar.write_bytes(task.tar.read_bytes()[:-1024]),
        lambda task: task.tar.write_bytes(task.tar.read_bytes() + b"more"),
        lambda task: task.tar.unlink(),
        lambda task: task.sidecar.unlink(),
        lambda task: task.sidecar.write_bytes(task.sidecar.read_bytes()[:-9]),
        lambda task: task.sidecar.write_text("[]"),
        lambda task: task.sidecar.write_text(task.sidecar.read_text().replace('"offsets":[0,', '"offsets":[1,')),
        lambda task: task.sidecar.write_text(task.sidecar.read_text().replace('"num_planned":5', '"num_planned":4')),
        lambda task: task.sidecar.write_text(task.sidecar.read_text().replace('"000000101"', '"000000100"')),
        lambda task: task.sidecar.write_text(task.sidecar.read_text().replace('"num_images":[1,', '"num_images":[2,')),
    ],
)
def test_what_does_not_verify_is_written_again(task: ShardTask, damage: Callable[[ShardTask], object]) -> None:
    first = write_shard(task)
    tar, sidecar = task.tar.read_bytes(), task.sidecar.read_bytes()
    damage(task)
    assert write_shard(task) == first
    assert (task.tar.read_bytes(), task.sidecar.read_bytes()) == (tar, sidecar)


def test_a_recheck_accepts_the_same_images_and_refuses_others(task: ShardTask) -> None:
    write_shard(task)
    recheck = ShardTask(task.name, task.folder, task.rows, task.settings, recheck=True)
    assert write_shard(recheck).num_samples == 4
    before, image = task.tar.read_bytes(), Path(task.rows[0].images[0].file)
    data = bytearray(image.read_bytes())
    data[-1] ^= 1  # the checksum of the closing chunk, which no decoder looks at
    image.write_bytes(data)
    with pytest.raises(ValueError, match=r"images behind .*shard-000007.tar are not what they were; use another --out"):
        write_shard(recheck)
    assert task.tar.read_bytes() == before and not list(task.folder.glob("*.part"))


def test_an_image_that_is_gone_stops_the_run_and_leaves_nothing(task: ShardTask) -> None:
    Path(task.rows[2].images[0].file).unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        write_shard(task)
    assert list(task.folder.iterdir()) == []


def test_a_shard_of_refused_rows_is_an_empty_tar(task: ShardTask) -> None:
    empty = ShardTask(task.name, task.folder, task.rows[3:4], task.settings)
    summary = write_shard(empty)
    assert (summary.num_samples, len(summary.rejects)) == (0, 1)
    assert task.tar.read_bytes() == END_OF_ARCHIVE
    assert write_shard(empty) == summary._replace(is_new=False)
