"""The stream under `ShardSet`: what is in a tar, what the listings must say, and streaming's own data set on top."""

import json
import tarfile
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from streaming import StreamingDataset
from streaming.base.stream import streams_registry
from streaming.base.util import clean_stale_shared_memory

from data_prep.listings import FORMAT, file_digest, read_listings, with_own_digest
from data_prep.tar_writer import tar_sample
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.tar_reader import record_end, split_members
from pipeline.shards.tar_stream import TarStream


def test_members_are_cut_as_tarfile_cuts_them(shard_folder, tmp_path):
    members = {"json": b'{"id": 1}', "0.jpg": b"", "1.png": bytes(512), "2.gif": b"x" * 513}
    blocks = tar_sample("000000042", members.items())
    assert split_members(blocks) == members
    assert record_end(blocks) == 512 + 9
    shards, number = ShardSet(shard_folder), 0
    for reader in shards.readers:
        with tarfile.open(reader.path) as tar:
            for key in reader.sidecar()["keys"]:
                found = shards.members(number)
                number += 1
                for name, data in found.items():
                    file = tar.extractfile(f"{key}.{name}")
                    assert file and file.read() == data
    assert number == len(shards)


@pytest.fixture
def no_shared_memory_left():
    """Stock data sets share memory between processes, and leave it."""
    yield
    clean_stale_shared_memory()


@pytest.mark.parametrize("how", ["stream", "name", "in place"])
def test_streamings_own_data_set_reads_our_tars(shard_folder, tmp_path, how, no_shared_memory_left):
    remote: dict[str, Any] = {"remote": f"file://{shard_folder}", "local": str(tmp_path / how)}
    if how == "name":
        dataset = StreamingDataset(stream_name=FORMAT, batch_size=1, **remote)
    else:
        stream = TarStream(local=str(shard_folder)) if how == "in place" else TarStream(**remote)
        dataset = StreamingDataset(streams=[stream], batch_size=1)
    shards = ShardSet(shard_folder)
    assert list(dataset) == [shards.members(number) for number in range(len(shards))]
    assert streams_registry.get(FORMAT) is TarStream


def test_streaming_does_not_tidy_up_shards_in_place(shard_folder, tmp_path):
    """It removes a data file whose meta file is missing, which without a remote is the only copy."""
    folder = copytree(shard_folder, tmp_path / "shards")
    (folder / "shard-000001.json").unlink()
    reader = TarStream(local=str(folder)).open()[1]
    assert reader.set_up_local({str(reader.path)}, safe_keep_zip=True) == 0
    assert reader.path.is_file() and reader.evict() == 0 and reader.path.is_file()


def change(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """Changes a listing, and then what the manifest tells of it and of itself: as if it had been written so."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index"] = file_digest((folder / "index.json").read_bytes()).model_dump()
    (folder / "manifest.json").write_bytes(with_own_digest(manifest))


def test_listings_must_agree(shard_folder, tmp_path):
    folder = copytree(shard_folder, tmp_path / "shards")
    manifest, index = (json.loads((folder / name).read_text()) for name in ("manifest.json", "index.json"))
    found = read_listings(folder)
    assert len(found.manifest.shards) == len(found.index.shards) == len(manifest["shards"])
    refused, other = {**manifest["shards"][0], "num_samples": 0}, manifest["shards"][1]
    first, several = index["shards"][0], index["shards"][1:]
    agree, both = r"manifest.json or index.json is damaged \(they list different shards\); delete both", "index.json"
    for name, value, message in [
        (
            "manifest.json",
            {"fingerprint": "0" * 64},
            r"damaged \(its fingerprint is not that of its shards",
        ),
        ("manifest.json", {"shards": manifest["shards"][::-1]}, "list different shards"),
        ("manifest.json", {"shards": [*manifest["shards"], refused]}, "shard-000000.tar is listed twice"),
        ("manifest.json", {"shards": [{**other, "sidecar_sha256": None}]}, "a checksum is missing"),
        ("manifest.json", {"shards": [{**other, "bytes": "7"}]}, "shards.0.bytes: Input should be a valid integer"),
        ("manifest.json", {"identity_sha256": None}, "a checksum is missing"),
        (both, {"shards": several}, agree),
        (both, {"shards": [{**first, "raw_meta": several[0]["raw_meta"]}, *several]}, "not the name of the sidecar of"),
        (both, {"shards": [{**first, "format": "mds"}]}, "shards.0.format: Input should be 'saisa-tar'"),
        (
            both,
            {"shards": [{key: first[key] for key in first if key != "size_limit"}]},
            "0.size_limit: Field required",
        ),
        (both, {"shards": None}, "index.json is damaged .shards: Input should be a valid array"),
    ]:
        before = {file: (folder / file).read_bytes() for file in ("manifest.json", "index.json")}
        change(folder, name, value)
        with pytest.raises(ValueError, match=f"{message}.*run the same `make shards` again") as caught:
            ShardSet(folder)
        assert "\n" not in str(caught.value)
        for file, data in before.items():
            (folder / file).write_bytes(data)
    for damage in ("{", "[" * 100_000, '"a"', "\xff"):
        (folder / "index.json").write_text(damage, encoding="latin-1")
        with pytest.raises(ValueError, match="index.json is damaged .*; delete it and run the same"):
            ShardSet(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="is not finished, it has no index.json; run the same"):
        ShardSet(folder)
