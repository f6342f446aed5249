"""Input and output in an object store: the same shards as in folders, through faults too, and errors one can read."""

import json
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from common.files import open_location
from data_prep.plan import Settings
from data_prep.shards import main, make_shards
from data_prep.zip_images import ZipDirectory
from tests.command_line import run_command
from tests.kills import REPOSITORY, command
from tests.s3_server import Bucket, Request

pytestmark = pytest.mark.usefixtures("local_ray")
SETTINGS = Settings(shard_bytes=20_000)
ODD_NAME = "caf\u00e9 1+1 = #2 %20?.png"


@pytest.fixture
def whole(dataset, tmp_path: Path) -> dict[str, bytes]:
    """The shards and sidecars of the data set, made in a folder from a folder."""
    (dataset.images / "0.png").rename(dataset.images / ODD_NAME)
    rows = json.loads(json.dumps(dataset.rows).replace('"0.png"', json.dumps(ODD_NAME)))
    dataset.data.write_text(json.dumps(rows))
    manifest = make_shards(dataset.data, dataset.images, tmp_path / "whole", SETTINGS)
    assert (manifest["num_samples"], manifest["num_shards"]) == (30, 4)
    return {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("shard-*")}


@pytest.fixture
def source(whole, dataset, s3: Bucket, tmp_path: Path) -> tuple[str, list[str]]:
    """URLs of the data and its images: those of the folder `deep` in a zip, the others as objects."""
    s3.put("rows.json", dataset.data.read_bytes())
    with zipfile.ZipFile(tmp_path / "deep.zip", "w") as zipped:
        for path in (dataset.images / "deep").iterdir():
            zipped.write(path, path.name)
    s3.put("deep.zip", (tmp_path / "deep.zip").read_bytes())
    for path in dataset.images.glob("*.*"):
        s3.put(f"images/{path.name}", path.read_bytes())
    return f"{s3.url}/rows.json", [f"deep={s3.url}/deep.zip", f"{s3.url}/images"]


@pytest.fixture
def shard(source, s3: Bucket) -> Callable[..., dict]:
    """Makes shards of the source in `out` of its bucket; takes other settings."""
    data, images = source
    return lambda settings=SETTINGS: make_shards(data, images, f"{s3.url}/out", settings)


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("shard-")}


def written(requests: list[Request]) -> set[str]:
    return {request.path.rsplit("/", 1)[-1] for request in requests if request.method not in ("GET", "HEAD")}


def test_a_bucket_gives_the_same_shards_as_a_folder(whole, shard, s3: Bucket) -> None:
    manifest = shard()
    files = s3.files("out")
    assert shards(files) == whole
    assert files.keys() - whole.keys() == {"plan.json", "rejects.jsonl", "index.json", "manifest.json"}
    with s3.server.watched() as requests:
        assert shard() == manifest
        with pytest.raises(ValueError, match=r"out holds other shards: seed was 0, is 1; use another --out"):
            shard(Settings(shard_bytes=20_000, seed=1))
    assert requests and not written(requests)
    image = s3.files("images")["3.png"]
    s3.put("images/3.png", image[:-1] + b"x")  # of the same size: only the store's ETag tells
    with pytest.raises(ValueError, match="are not what they were"):
        shard()
    assert shards(s3.files("out")) == whole and "manifest.json" in s3.files("out")


def test_a_zip_takes_two_reads_to_open(source, s3: Bucket) -> None:
    location = open_location(f"{s3.url}/deep.zip")
    with s3.server.watched() as requests:
        directory = ZipDirectory(location)
    assert [request.method for request in requests] == ["HEAD", "GET", "GET"]
    assert directory.find("1.jpg") and not directory.find("2.jpg")


@pytest.mark.slow  # retries wait
def test_every_third_request_may_fail(whole, shard, s3: Bucket) -> None:
    with s3.server.watched(fail_every=3) as requests:
        shard()
    seen, failed = (Counter(r.method for r in requests if r.failed or not only) for only in (False, True))
    assert failed == {method: number // 3 for method, number in seen.items() if number // 3}
    assert {"GET", "HEAD", "PUT"} <= failed.keys()
    assert shards(s3.files("out")) == whole


def test_what_is_missing_is_written_again_and_nothing_else(whole, shard, s3: Bucket) -> None:
    shard()
    before = s3.files("out")
    s3.delete("out/shard-000000.tar")
    s3.delete("out/shard-000002.json")  # as if the run had ended between the tar and its sidecar
    s3.put("out/shard-000003.tar", whole["shard-000003.tar"][:-1] + b"\1")
    with s3.server.watched() as requests:
        shard()
    again = {f"shard-00000{number}.{kind}" for number in (0, 2, 3) for kind in ("tar", "json")}
    taken_down_and_put = {"manifest.json", "index.json", "rejects.jsonl"}
    assert {name for name in written(requests) if "." in name} == again | taken_down_and_put
    assert s3.files("out") == before


def test_urls_of_files_mean_the_files(whole, dataset, tmp_path: Path) -> None:
    make_shards(f"file://{dataset.data}", f"file://{dataset.images}", f"file://{tmp_path}/out", SETTINGS)
    assert shards({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}) == whole


@pytest.fixture
def new_clients() -> Iterator[None]:
    """Lets a test change what clients learn when they are made: the others keep theirs."""
    s3fs = fsspec.get_filesystem_class("s3")
    s3fs.clear_instance_cache()
    yield
    s3fs.clear_instance_cache()


run_cli = partial(run_command, main)


@pytest.mark.parametrize(
    ("option", "template", "named"),
    [
        ("--data", "s3://no-such-bucket/rows.json", "{location} cannot be reached: there is no bucket of this name"),
        ("--images", "s3://no-such-bucket", "{location} cannot be reached: there is no bucket of this name"),
        ("--out", "s3://no-such-bucket/out", "{location} cannot be reached: there is no bucket of this name"),
        ("--data", "{bucket}/no-such.json", "{location}: The specified key does not exist."),
        ("--data", "{bucket}/broken.json", "{location} is not a list of rows in JSON: the file ends inside the array"),
        ("--images", "{bucket}/none", "--images {location} lists no files; give a URL that can be listed"),
        ("--images", "{bucket}/rows.json", "--images {location} is not a readable zip file"),
        ("--out", "none://out", "{location} cannot be reached: Unsupported filesystem: 'none'"),
        ("--out", "no-such-kind://out", "{location} cannot be reached: there is no such kind of URL"),
    ],
)
def test_what_is_not_there_is_named(source, s3: Bucket, option: str, template: str, named: str) -> None:
    s3.put("broken.json", b'[{"id": "a"}')
    location = template.format(bucket=s3.url)
    arguments = {"--data": source[0], "--images": source[1][1], "--out": f"{s3.url}/out"} | {option: location}
    status, said = run_cli(*(argument for pair in arguments.items() for argument in pair))
    assert status == 1 and said.splitlines()[-1].startswith(f"error: {named.format(location=location)}")
    assert not s3.files("out")


def test_a_store_that_only_fails_is_not_asked_for_minutes(dataset, s3: Bucket, tmp_path: Path) -> None:
    with (
        s3.server.watched(fail_every=1) as requests,
        pytest.raises(ValueError, match="out cannot be reached: Internal Server Error"),
    ):
        make_shards(dataset.data, dataset.images, f"{s3.url}/out", SETTINGS)
    assert 1 < len(requests) < 10


@pytest.mark.usefixtures("new_clients")
def test_missing_credentials_are_told(dataset, s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for out in (s3.url, f"{s3.url}/out"):
        with pytest.raises(ValueError, match=f"{out} cannot be reached: Unable to locate credentials"):
            make_shards(dataset.data, dataset.images, out, SETTINGS)


def test_an_endpoint_that_nobody_answers_at_is_one_line(dataset, s3_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = ["--data", str(dataset.data), "--images", str(dataset.images)]
    run = subprocess.run(command(options, "s3://bucket/out"), cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines() == [
        "error: s3://bucket/out cannot be reached: "
        'Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket/out"'
    ]
