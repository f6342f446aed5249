"""Rows of Parquet and Arrow files give the shards that the same rows as JSON and the same images as files give."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from common.files import open_location
from data_prep import tables
from data_prep.plan import Settings
from data_prep.shards import main, make_shards
from data_prep.tables import Spool, find_tables, read_table, take_images
from data_prep.verify import verify_shards
from tests.command_line import run_command

pytestmark = pytest.mark.usefixtures("local_ray")
SMALL = Settings(shard_bytes=12_000)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


class Rows:
    """The single-image and text-only rows of a data set with texts as ids: as JSON, and with the images inside."""

    def __init__(self, dataset, is_list: bool = False) -> None:
        self.rows = [row | {"id": str(row["id"])} for row in dataset.rows[:27]]
        self.images = dataset.images
        for row in self.rows:
            row.pop("model", None)
            if is_list and "image" in row:
                row["image"] = [row["image"]]
        self.data = dataset.data
        self.data.write_text(json.dumps(self.rows))
        image = pa.list_(IMAGE) if is_list else IMAGE
        self.schema = pa.schema([("id", pa.string()), ("image", image), ("conversations", TURNS)])

    def embed(self, paths: Any) -> Any:
        if isinstance(paths, list):
            return [self.embed(path) for path in paths]
        return paths and {"bytes": (self.images / paths).read_bytes(), "path": paths}

    def table(self, start: int = 0, end: int | None = None) -> pa.Table:
        rows = [{**row, "image": self.embed(row.get("image"))} for row in self.rows[start:end]]
        return pa.Table.from_pylist(rows, self.schema)


def write_parquet(rows: Rows, folder: Path) -> Path:
    pq.write_table(rows.table(), folder / "rows.parquet", row_group_size=5)
    return folder / "rows.parquet"


def write_parquet_folder(rows: Rows, folder: Path) -> Path:
    folder = folder / "parquet"
    folder.mkdir()
    for number, (start, end) in enumerate(((0, 11), (11, 12), (12, None))):
        pq.write_table(rows.table(start, end), folder / f"train-0000{number}-of-00003.parquet", row_group_size=4)
    return folder


def write_datasets_folder(rows: Rows, folder: Path) -> Path:
    """As `datasets.Dataset.save_to_disk` does: Arrow streams beside two JSON files."""
    folder = folder / "saved"
    folder.mkdir()
    for number, (start, end) in enumerate(((0, 14), (14, None))):
        table = rows.table(start, end)
        with pa.ipc.new_stream(folder / f"data-0000{number}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    return folder


def write_arrow_file(rows: Rows, folder: Path) -> Path:
    with pa.ipc.new_file(folder / "rows.arrow", rows.schema) as writer:
        writer.write_table(rows.table(), max_chunksize=10)
    return folder / "rows.arrow"


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize(
    ("write", "is_list"),
    [(write_parquet, False), (write_parquet_folder, True), (write_datasets_folder, False), (write_arrow_file, True)],
)
def test_shards_are_those_of_json_and_files(dataset, tmp_path: Path, write: Callable, is_list: bool) -> None:
    """To the byte: the rows say the same, and the images are the same files."""
    rows = Rows(dataset, is_list)
    expected = make_shards(rows.data, rows.images, tmp_path / "json", SMALL)
    data = write(rows, tmp_path)
    manifest = make_shards(data, (), tmp_path / "table", SMALL)
    assert tars(tmp_path / "table") == tars(tmp_path / "json") and len(tars(tmp_path / "json")) > 6
    assert manifest["fingerprint"] == expected["fingerprint"] and manifest["num_samples"] == 27
    files = manifest["sources"]["data"]["files"]
    assert [file["name"] for file in files] == [path.name for path in find_tables(open_location(data))]
    assert verify_shards(tmp_path / "table") == manifest


def test_any_number_of_workers_and_a_killed_run_give_the_same(dataset, tmp_path: Path) -> None:
    data = write_parquet_folder(Rows(dataset), tmp_path)
    make_shards(data, (), tmp_path / "a", SMALL, workers=1)
    make_shards(data, (), tmp_path / "b", SMALL, workers=2)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    for name in ("manifest.json", "index.json", "shard-000001.tar", "shard-000002.json"):
        (tmp_path / "b" / name).unlink()
    make_shards(data, (), tmp_path / "b", SMALL)
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_bytes_without_a_path_are_called_by_their_hash(dataset, tmp_path: Path) -> None:
    table = Rows(dataset).table()
    bare = pa.array([image and image["bytes"] for image in table["image"].to_pylist()], pa.binary())
    pq.write_table(table.set_column(1, "image", bare), tmp_path / "bare.parquet", row_group_size=7)
    make_shards(tmp_path / "bare.parquet", (), tmp_path / "out", Settings(shuffle=False))
    sidecar = json.loads((tmp_path / "out" / "shard-000000.json").read_text())
    assert len(sidecar["keys"]) == 27 and sum(sidecar["num_images"]) == 24
    row, images = take_images({"image": b"abc", "id": None})
    assert row == {"image": "ba7816bf8f01cfea414140de5dae2223"} and images == {row["image"]: b"abc"}  # FIPS 180-2


def test_paths_of_images() -> None:
    """Kept where they may stand in a record and are one image's alone; else the hash of the bytes."""
    one = {"bytes": b"1", "path": "a/1.jpg"}
    others = [{"bytes": b"2", "path": "a/1.jpg"}, {"bytes": b"3", "path": "/root/x"}, {"bytes": b"4", "path": "../x"}]
    row, images = take_images({"images": [one, *others, {"bytes": None, "path": "b.jpg"}, "c.jpg", one]})
    first, second, third, fourth, *rest = row["images"]
    assert first == "a/1.jpg" and rest == ["b.jpg", "c.jpg", "a/1.jpg"]
    assert images == {first: b"1", second: b"2", third: b"3", fourth: b"4"}
    assert {len(second), len(third), len(fourth)} == {32}


def test_rows_with_paths_alone_find_their_images_in_the_roots(dataset, tmp_path: Path) -> None:
    rows = Rows(dataset)
    pq.write_table(pa.Table.from_pylist(rows.rows), tmp_path / "paths.parquet")
    make_shards(rows.data, rows.images, tmp_path / "json", SMALL)
    make_shards(tmp_path / "paths.parquet", rows.images, tmp_path / "table", SMALL)
    assert tars(tmp_path / "table") == tars(tmp_path / "json")


def test_a_row_group_is_read_when_the_one_before_is_used_up(dataset, tmp_path: Path, monkeypatch) -> None:
    rows, asked = Rows(dataset), []
    data, read = write_parquet(rows, tmp_path), pq.ParquetFile.iter_batches

    def counting(self, *args, row_groups, **options):
        asked.extend(row_groups)
        return read(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(tables.pq.ParquetFile, "iter_batches", counting)
    for number, row in enumerate(read_table(data, data)):
        assert row["id"] == rows.rows[number]["id"] and asked == list(range(number // 5 + 1))


def test_a_batch_becomes_objects_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """However large a row group is."""
    data = tmp_path / "large.parquet"
    pq.write_table(pa.table({"id": range(1000)}), data, row_group_size=1000)
    sizes = [batch.num_rows for batch in tables._batches(data)]
    assert sum(sizes) == 1000 and max(sizes) <= tables.ROWS_AT_A_TIME


def test_refused_rows_are_named_by_file_and_row(dataset, tmp_path: Path) -> None:
    rows = Rows(dataset)
    (rows.images / rows.rows[12]["image"]).write_bytes(b"no image")
    rows.rows[25]["conversations"] = []
    data = write_parquet_folder(rows, tmp_path)
    arguments = ("--data", data, "--out", tmp_path / "out", "--workers", 1, "--max-bad-fraction", 0.5)
    status, said = run_command(main, *arguments)
    assert status == 0 and "27 rows = 25 samples + 2 refused" in said
    assert "record 25 (index 25, row 13 of train-00002-of-00003.parquet): 'conversations' is []" in said
    assert "record row-12 (index 12, row 0 of train-00002-of-00003.parquet): not an image that can be read" in said
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["index"], reject["kind"]) for reject in rejects] == [(12, "not_an_image"), (25, "conversations")]


def test_a_dry_run_lays_no_image_down(dataset, tmp_path: Path, monkeypatch) -> None:
    data, left = write_parquet(Rows(dataset), tmp_path), []
    close = Spool.close

    def watched(self) -> None:
        self.flush()
        left.append(self.images.stat().st_size)
        close(self)

    monkeypatch.setattr(Spool, "close", watched)
    status, said = run_command(main, "--data", data, "--out", tmp_path / "out", "--dry-run")
    assert status == 0 and "27 rows: 27 to write and 0 refused so far" in said and left == [0]
    assert not (tmp_path / "out").exists()


def test_damage_is_one_line(dataset, tmp_path: Path) -> None:
    data = write_parquet(Rows(dataset), tmp_path)
    whole, generator, refused = data.read_bytes(), random.Random(0), 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial < 5:
            del damaged[len(whole) * trial // 5 :]
        else:
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        data.write_bytes(damaged)
        try:
            list(read_table(data, data))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{data} cannot be read as a table of rows: ") and "\n" not in str(error)
    assert refused >= 5


def test_what_is_no_table_of_rows_is_one_line(dataset, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("PAR1 or so")
    (tmp_path / "text.arrow").write_text("ARROW1 or so")
    pq.write_table(pa.table({"id": [1], "blob": [b"1"]}), tmp_path / "blob.parquet")
    pq.write_table(pa.table({"id": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    (tmp_path / "splits").mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / f"{split}-00000-of-00001.parquet").touch()
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    for name, told in (
        ("text.parquet", "cannot be read as a table of rows"),
        ("text.arrow", "cannot be read as a table of rows"),
        ("blob.parquet", "column 'blob' holds bytes, and only image and images may"),
        ("none.parquet", "holds no rows"),
        ("images", "is a folder without .parquet or .arrow files"),
        ("splits", "holds several splits (test, train); give each a folder of its own"),
        ("dict", f"name the folder of one, such as {tmp_path}/dict/train"),
    ):
        status, said = run_command(main, "--data", tmp_path / name, "--out", tmp_path / "out", "--workers", 1)
        (line,) = [line for line in said.splitlines() if line.startswith("error")]
        assert status == 1 and told in line


def test_what_is_missing_is_told_before_anything_is_written(dataset, tmp_path: Path, monkeypatch) -> None:
    run = partial(run_command, main, "--out", tmp_path / "out")
    status, said = run("--data", dataset.data)
    assert status == 2 and "--images is missing; give a folder, a zip or a URL" in said
    monkeypatch.delenv("TMPDIR", raising=False)
    status, said = run("--data", write_parquet(Rows(dataset), tmp_path), "--address", "auto")
    assert status == 2 and "set TMPDIR to a folder that every machine sees" in said
    assert not (tmp_path / "out").exists()


def test_messages_and_images_are_read_as_those_of_json(dataset, tmp_path: Path) -> None:
    """The other common columns: `messages` of roles and contents, and a list `images`."""
    rows = Rows(dataset)
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(IMAGE)), ("messages", turns)])
    renamed, tabled = [], []
    for row in rows.rows:
        messages = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
        paths = [row["image"]] if row.get("image") else []
        renamed.append({"id": row["id"], "images": paths, "messages": messages})
        tabled.append(renamed[-1] | {"images": rows.embed(paths)})
    rows.data.write_text(json.dumps(renamed))
    pq.write_table(pa.Table.from_pylist(tabled, schema), tmp_path / "rows.parquet", row_group_size=5)
    make_shards(rows.data, rows.images, tmp_path / "json", SMALL)
    make_shards(tmp_path / "rows.parquet", (), tmp_path / "parquet", SMALL)
    assert tars(tmp_path / "parquet") == tars(tmp_path / "json")


def test_a_url_is_read_as_a_folder_is(dataset, tmp_path: Path) -> None:
    data = write_parquet_folder(Rows(dataset), tmp_path)
    store = open_location("memory://tables-test/rows")
    for path in data.iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    make_shards(data, (), tmp_path / "local", SMALL)
    make_shards("memory://tables-test/rows", (), tmp_path / "url", SMALL)
    assert tars(tmp_path / "url") == tars(tmp_path / "local")


def test_photos_in_a_table(realdata: Path, tmp_path: Path) -> None:
    """Real photos: what is in the tars is the files."""
    data, images = realdata / "coco_photos" / "llava_pretrain.json", realdata / "coco_photos" / "images"
    rows = json.loads(data.read_text())
    inside = [row | {"image": {"bytes": (images / row["image"]).read_bytes(), "path": row["image"]}} for row in rows]
    pq.write_table(pa.Table.from_pylist(inside), tmp_path / "photos.parquet", row_group_size=8)
    make_shards(data, images, tmp_path / "json", Settings())
    make_shards(tmp_path / "photos.parquet", (), tmp_path / "table", Settings())
    assert tars(tmp_path / "table") == tars(tmp_path / "json")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    arrays = [pa.array([[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]])] * 2
    pq.write_table(pa.Table.from_arrays(arrays, names=["conversations"] * 2), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'conversations' is there 2 times, and only one can be meant"):
        list(read_table(tmp_path / "a.parquet", "a.parquet"))
