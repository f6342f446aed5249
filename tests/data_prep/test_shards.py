"""Sharding end to end on a real Ray: same bytes from every road, nothing lost, and honest exits."""

import io
import json
import os
import subprocess
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_prep.plan import Settings
from data_prep.shards import main, make_shards, parse_bytes
from tests.command_line import run_command

pytestmark = pytest.mark.usefixtures("local_ray")
SMALL = Settings(shard_bytes=12_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tars(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".tar")}


run_cli = partial(run_command, main)


def cli_arguments(dataset, out: Path) -> list[object]:
    return ["--data", dataset.data, "--images", dataset.images, "--out", out, "--shard-bytes", "12kB"]


def test_bytes_do_not_depend_on_the_number_of_workers(dataset, tmp_path: Path) -> None:
    first = make_shards(dataset.data, dataset.images, tmp_path / "one", SMALL, workers=1)
    second = make_shards(dataset.data, dataset.images, tmp_path / "two", SMALL, workers=2)
    assert first == second and first["num_shards"] > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_zip_and_folder_json_and_jsonl_give_the_same_shards(dataset, tmp_path: Path) -> None:
    archive, lines = tmp_path / "images.zip", tmp_path / "rows.jsonl"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in dataset.images.rglob("*.*"):
            zipped.write(path, path.relative_to(dataset.images))
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in dataset.rows))
    first = make_shards(dataset.data, dataset.images, tmp_path / "folder", SMALL)
    second = make_shards(lines, archive, tmp_path / "zip", SMALL)
    assert tars(tmp_path / "folder") == tars(tmp_path / "zip")
    assert first["fingerprint"] == second["fingerprint"]
    other = make_shards(dataset.data, dataset.images, tmp_path / "other", Settings(shard_bytes=12_000, seed=1))
    assert other["fingerprint"] != first["fingerprint"]


def test_webdataset_reads_every_row_and_image_back(dataset, tmp_path: Path) -> None:
    manifest = make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL)
    assert (manifest["num_samples"], manifest["num_images"], manifest["num_rejected"]) == (30, 30, 0)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{place:09d}" for place in range(30)]
    records = [json.loads(sample["json"]) for sample in samples]
    order = [record["source_index"] for record in records]
    assert sorted(order) == list(range(30)) and order != list(range(30))
    for sample, record in zip(samples, records, strict=True):
        row = dataset.rows[record["source_index"]]
        assert record["conversations"] == row["conversations"]
        paths = row.get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        assert [image["path"] for image in record["images"]] == paths
        for image in record["images"]:
            data = sample[image["member"]]
            assert data == (dataset.images / image["path"]).read_bytes()
            with Image.open(dataset.images / image["path"]) as picture:
                assert (picture.format, picture.size) == (image["format"], (image["width"], image["height"]))
    members = {image["member"] for record in records for image in record["images"]}
    assert members == {"png", "jpg", "gif", "0.png", "1.jpg", "1.png"}


def test_any_tar_tool_lists_them(dataset, tmp_path: Path) -> None:
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings(shuffle=False))
    listed = subprocess.run(
        ["tar", "-tf", tmp_path / "out" / "shard-000000.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stderr == "" and len(listed.stdout.split()) == 60
    assert listed.stdout.split()[:5] == [
        "000000000.json",
        "000000000.png",
        "000000001.json",
        "000000001.jpg",
        "000000002.json",
    ]


def test_a_finished_run_is_not_repeated_and_a_changed_one_refused(dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = cli_arguments(dataset, out)
    status, said = run_cli(*arguments)
    assert status == 0 and "30 rows = 30 samples + 0 refused" in said
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    status, said = run_cli(*arguments)
    assert status == 0 and "is complete and was made from this input: nothing to do" in said
    for more, named in (
        (["--seed", 3], "seed was 0, is 3"),
        (["--no-shuffle"], "shuffle was True, is False"),
        (["--shard-bytes", "9kB"], "shard-bytes was 12000, is 9000"),
    ):
        status, said = run_cli(*arguments, *more)
        assert status == 1 and said.splitlines()[-1].startswith("error: ") and named in said
    dataset.data.write_text(json.dumps(dataset.rows[:-1]))
    status, said = run_cli(*arguments)
    assert status == 1 and "other data; other images" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_touched_images_are_compared_and_swapped_ones_refused(dataset, tmp_path: Path) -> None:
    out, image = tmp_path / "out", dataset.images / "0.png"
    first = make_shards(dataset.data, dataset.images, out, SMALL)
    before = contents(out)
    os.utime(image, ns=(1, 1))
    assert make_shards(dataset.data, dataset.images, out, SMALL) == first
    assert contents(out).keys() == before.keys() and tars(out).items() <= before.items()
    data = image.read_bytes()
    image.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="are not what they were"):
        make_shards(dataset.data, dataset.images, out, SMALL)
    assert (out / "manifest.json").exists()


def test_whatever_is_damaged_or_missing_is_made_again(dataset, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    make_shards(dataset.data, dataset.images, whole, SMALL)
    make_shards(dataset.data, dataset.images, out, SMALL)
    for name in ("manifest.json", "index.json", "shard-000000.tar", "shard-000001.json"):
        (out / name).unlink()
    (out / "shard-000002.tar").write_bytes(b"cut")
    (out / "shard-000002.tar.0123.part").write_bytes(b"left behind")
    make_shards(dataset.data, dataset.images, out, SMALL)
    assert contents(out) == contents(whole)
    (out / "shard-000003.tar").unlink()
    make_shards(dataset.data, dataset.images, out, SMALL)
    assert contents(out) == contents(whole)


def test_bad_rows_are_counted_named_and_limited(dataset, tmp_path: Path) -> None:
    turns = dataset.rows[0]["conversations"]
    (dataset.images / "cut.png").write_bytes((dataset.images / "0.png").read_bytes()[:60])
    (dataset.images / "page.jpg").write_text("<html>not found</html>")
    bad = [
        {"id": "no-file", "image": "none.jpg", "conversations": turns},
        {
            "id": "two-tokens",
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image><image>"}, turns[1]],
        },
        {"id": "up", "image": "../0.png", "conversations": turns},
        {"id": "cut", "image": "cut.png", "conversations": turns},
        {
            "id": "page",
            "image": ["0.png", "page.jpg"],
            "conversations": [{"from": "human", "value": "<image><image>"}, turns[1]],
        },
        {"id": "not-a-number", "image": "0.png", "conversations": turns, "score": float("nan")},
        "a text",
    ]
    dataset.data.write_text(json.dumps([*bad[:4], *dataset.rows, *bad[4:]]))
    arguments = cli_arguments(dataset, tmp_path / "out")
    status, said = run_cli(*arguments)
    assert status == 1 and "4 of 37 rows of rows.json refused, more than --max-bad-fraction 0.01" in said
    assert not (tmp_path / "out" / "manifest.json").exists() and len(tars(tmp_path / "out")) == 0
    status, said = run_cli(*arguments, "--max-bad-fraction", 0.12)  # the scan passes, the decoding does not
    assert status == 1 and "error: " in said.splitlines()[-1] and "refused because" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert 5 <= len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) <= 7
    status, said = run_cli(*arguments, "--max-bad-fraction", 0.2)
    assert status == 0 and "37 rows = 30 samples + 7 refused" in said
    assert sum(line.startswith("refused (") for line in said.splitlines()) == 7
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["index"], reject["id"], reject["kind"], reject["file"]) for reject in rejects] == [
        (0, "no-file", "image_missing", "none.jpg"),
        (1, "two-tokens", "image_count", None),
        (2, "up", "image_path", "../0.png"),
        (3, "cut", "image_damaged", "cut.png"),
        (34, "page", "not_an_image", "page.jpg"),
        (35, "not-a-number", "text", None),
        (36, "36", "not_an_object", None),
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_rows"] == manifest["num_samples"] + manifest["num_rejected"] == 37


def test_a_dry_run_checks_everything_but_pixels_and_writes_nothing(dataset, tmp_path: Path) -> None:
    status, said = run_cli(*cli_arguments(dataset, tmp_path / "out"), "--dry-run")
    assert status == 0 and "30 rows: 30 to write and 0 refused so far" in said and "nothing was written" in said
    dataset.data.write_text(json.dumps([*dataset.rows, {"id": "a"}]))
    status, said = run_cli(*cli_arguments(dataset, tmp_path / "out"), "--dry-run")
    assert status == 1 and "1 of 31 rows of rows.json refused" in said and "refused because" in said
    assert not (tmp_path / "out").exists()


def test_several_roots_lying_extensions_and_duplicates(dataset, tmp_path: Path) -> None:
    (dataset.images / "deep").rename(tmp_path / "elsewhere")
    (dataset.images / "2.jpg").rename(dataset.images / "2.gif")
    dataset.data.write_text(json.dumps([*dataset.rows, dataset.rows[0] | {"id": "again"}]))
    arguments = cli_arguments(dataset, tmp_path / "out")
    more = ["--images", f"deep={tmp_path / 'elsewhere'}", "--deduplicate", "--max-bad-fraction", 0]
    status, said = run_cli(*arguments, *more)
    assert status == 0 and "31 rows = 27 samples + 4 refused" in said  # duplicates are not bad
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_other_extensions"] == 1
    assert manifest["sources"]["images"]["names"] == ["images", "elsewhere"]
    samples = WebDataset([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))], shardshuffle=False)
    images = [image for sample in samples for image in json.loads(sample["json"])["images"]]
    assert [(i["path"], i["member"]) for i in images if i.get("found_as") == "2.gif"] == [("2.jpg", "gif")]
    assert sum("found_as" in image for image in images) == 1


def test_large_images_are_shrunk_on_request_and_the_record_tells(dataset, tmp_path: Path) -> None:
    settings = replace(SMALL, resize_longest=24)
    manifest = make_shards(dataset.data, dataset.images, tmp_path / "out", settings)
    assert manifest["settings"]["resize_longest"] == 24
    samples = WebDataset([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))], shardshuffle=False)
    sizes = {}
    for sample in samples:
        for info in json.loads(sample["json"])["images"]:
            with Image.open(io.BytesIO(sample[info["member"]])) as image:
                assert (image.format, image.size) == (info["format"], (info["width"], info["height"]))
            sizes[info["path"]] = (info.get("source_width"), *image.size)
    assert sizes["0.png"] == (None, 16, 20) and sizes["deep/22.jpg"] == (38, 24, 13)
    with pytest.raises(ValueError, match="resize-longest was 24, is None"):
        make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL)


def test_headers_alone_let_damaged_pixels_pass(dataset, tmp_path: Path) -> None:
    image = dataset.images / "0.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match="refused, more than"):
        make_shards(dataset.data, dataset.images, tmp_path / "out", SMALL)
    manifest = make_shards(dataset.data, dataset.images, tmp_path / "new", replace(SMALL, check="header"))
    assert manifest["num_samples"] == 30


def test_nothing_left_is_an_error(dataset, tmp_path: Path) -> None:
    dataset.data.write_text('[{"id": "a"}]')
    status, said = run_cli(*cli_arguments(dataset, tmp_path / "out"), "--max-bad-fraction", 1)
    assert status == 1 and "every row was refused" in said and not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("status", "arguments", "named"),
    [
        (2, ["--shard-bytes", "12 parsecs"], "--shard-bytes '12 parsecs' is not a size; use e.g. 256MB"),
        (2, ["--shard-bytes", "0"], "--shard-bytes '0'"),
        (2, ["--workers", "0"], "--workers 0 must be at least 1"),
        (2, ["--max-bad-fraction", "1.5"], "--max-bad-fraction 1.5 must lie between 0 and 1"),
        (2, ["--seed", "-1"], "--seed -1 must not be negative"),
        (2, ["--sead", "1"], "No such option"),
        (1, ["--data", "/no/such.json"], "/no/such.json: No such file or directory"),
        (1, ["--images", "/no/such"], "--images /no/such is not there; give a folder or a zip"),
        (1, ["--data", "s3x://a/b.json"], "s3x://a/b.json cannot be reached"),
        (2, ["--check", "some"], "--check some is unknown; use decode or header"),
        (1, ["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_exit_status(dataset, tmp_path: Path, status: int, arguments: list[str], named: str) -> None:
    found, said = run_cli(*cli_arguments(dataset, tmp_path / "out"), *arguments)
    assert found == status and named in said


def test_an_unreadable_source_is_named_with_the_place(dataset, tmp_path: Path) -> None:
    dataset.data.write_text('[{"id": "a"},\n {"id" "b"}]')
    status, said = run_cli(*cli_arguments(dataset, tmp_path / "out"))
    assert status == 1 and f"error: {dataset.data} is not a list of rows in JSON" in said and "line 2 (byte 21)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipe.json", "pipe.parquet", "pipe", "zero.json"])
def test_rows_come_out_of_regular_files(dataset, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    if name != "pipe":
        (tmp_path / name).symlink_to("/dev/zero" if name == "zero.json" else "pipe")
    with pytest.raises(ValueError, match=f"{name} is a pipe or a device; only regular files are read"):
        make_shards(tmp_path / name, dataset.images, tmp_path / "out", Settings())


def test_rows_that_are_nested_too_deeply_are_counted(dataset, tmp_path: Path) -> None:
    rows = dataset.data.read_text().rstrip().removesuffix("]")
    deep = [f'{{"id": {"[" * depth}{"]" * depth}, "conversations": 1}}' for depth in (990, 5000)]
    dataset.data.write_text(f"{rows}, {', '.join(deep)}]")
    make_shards(dataset.data, dataset.images, tmp_path / "out", Settings(), 1, max_bad_fraction=0.9)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects[-2:]] == ["the row is nested more than 100 deep"] * 2


def test_sizes() -> None:
    sizes = [parse_bytes(text) for text in ("256MB", "1GiB", "1.5 kb", "1000", "2MiB")]
    assert sizes == [256_000_000, 2**30, 1500, 1000, 2**21]


@pytest.mark.parametrize("name", ["llava_instruct.json", "llava_pretrain.json"])
def test_real_photos(realdata: Path, tmp_path: Path, name: str) -> None:
    folder = realdata / "coco_photos"
    manifest = make_shards(folder / name, folder / "images", tmp_path / "out", Settings(shard_bytes=1_000_000))
    assert (manifest["num_samples"], manifest["num_images"], manifest["num_rejected"]) == (39, 39, 0)
    assert 6 <= manifest["num_shards"] <= 10
    photos = {path.read_bytes() for path in (folder / "images").iterdir()}
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert {sample["jpg"] for sample in WebDataset(urls, shardshuffle=False)} == photos
