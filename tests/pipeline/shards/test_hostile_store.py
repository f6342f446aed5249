"""A store whose listings name other files, and a cache that somebody put links into: nothing outside is touched."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from common.paths import within
from data_prep.listings import file_digest, with_own_digest
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.tar_reader import DamagedShard
from tests.soak.fuzz import believe_listings
from tests.watch import snapshot


@pytest.fixture
def victim(tmp_path) -> Iterator[Path]:
    """A file in a folder that must stay as it is."""
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "victim").write_text("mine")
    os.utime(outside / "victim", ns=(10**18, 10**18))
    before = snapshot(outside)
    yield outside / "victim"
    assert snapshot(outside) == before


def hostile_store(store: Path, out: Path, number: int, kind: str, name: str) -> Path:
    """Returns a copy of a shard set whose listings agree that the tar or sidecar of a shard is called `name`.

    The file is there, and the digests are right: a listing that checksums alone would not find out.
    """
    copytree(store, out)
    index, manifest = (json.loads((out / file).read_text()) for file in ("index.json", "manifest.json"))
    info = index["shards"][number]["raw_data" if kind == "tar" else "raw_meta"]
    data = (out / info["basename"]).read_bytes() + b"\n"
    info |= {"basename": name, "bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}
    manifest["shards"][number][kind] = name
    if kind == "sidecar":
        manifest["shards"][number]["sidecar_sha256"] = info["hashes"]["sha256"]
    else:
        manifest["shards"][number] |= {"bytes": len(data), "sha256": info["hashes"]["sha256"]}
    hashes = "\n".join(shard["sha256"] for shard in manifest["shards"])
    manifest["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest()
    (out / "index.json").write_text(json.dumps(index))
    manifest["index"] = file_digest((out / "index.json").read_bytes()).model_dump()
    (out / "manifest.json").write_bytes(with_own_digest(manifest))
    if not (there := Path(f"{out}/{name}")).exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(data)
    return out


@pytest.mark.parametrize("kind", ["tar", "sidecar"])
@pytest.mark.parametrize("name", ["../../home/victim", "{victim}", "sub/shard-000007.json", "index.json"])
def test_a_listing_that_names_another_file_is_refused_by_name(shard_folder, tmp_path, victim, kind, name):
    name = name.format(victim=victim)
    store = hostile_store(shard_folder, tmp_path / "a" / "store", -1, kind, name)
    before = snapshot(tmp_path)
    for location in (f"file://{store}", str(store)):
        with pytest.raises(ValueError, match=r"no name of a shard|not the name of the sidecar") as refused:
            shards = ShardSet(location, tmp_path / "cache", 10**9)
            list(map(shards.members, range(len(shards))))
        assert name in str(refused.value) and "\n" not in str(refused.value)
    assert snapshot(tmp_path) == before


def test_a_fingerprint_names_a_folder_of_the_cache(shard_folder, tmp_path, victim):
    store = copytree(shard_folder, tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_bytes(with_own_digest(manifest | {"fingerprint": "../home"}))
    with pytest.raises(ValueError, match="fingerprint"):
        ShardSet(f"file://{store}", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../victim", "/victim", "..", ".", "", "a/b", "a\0b"])
def test_the_cache_has_no_path_outside_whatever_a_listing_says(tmp_path, victim, name):
    root = victim.parent.parent / "cache"
    cache = ShardCache(root, "0" * 64, 10)
    with pytest.raises(ValueError, match="nothing outside"):
        cache.path(name)
    with pytest.raises(ValueError, match="nothing outside"), cache.locked(name):
        pass
    with pytest.raises(ValueError, match="nothing outside"), cache.arriving(name, 1, (), True):
        pass
    with pytest.raises(ValueError, match="nothing outside"):
        ShardCache(root, name, None)
    assert not root.exists()


def test_a_cache_may_itself_be_reached_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to("disk")
    assert within(tmp_path / "cache", "a", "b") == tmp_path / "cache" / "a" / "b"


@pytest.mark.parametrize("what", ["set", "file", "locks", "lock", "cache lock", "part"])
def test_links_inside_a_cache_are_refused_by_name_and_not_followed(shard_folder, tmp_path, victim, what):
    cache, location = tmp_path / "cache", f"file://{shard_folder}"
    folder = ShardSet(location, cache).readers[0].path.parent
    tar = folder / "shard-000000.tar"
    size = (shard_folder / tar.name).stat().st_size
    link = {
        "set": folder,
        "file": tar,
        "locks": folder / ".locks",
        "lock": folder / ".locks" / tar.name,
        "cache lock": cache / ".lock",
        "part": folder / f"{tar.name}.{size}.part",
    }[what]
    link.parent.mkdir(parents=True)
    link.symlink_to(victim.parent if what in ("set", "locks", "part") else victim)
    if what == "part":  # what a killed download left is removed: the link, not what it leads to
        assert ShardSet(location, cache, 10**9).members(0) == ShardSet(shard_folder).members(0)
        return
    with pytest.raises(ValueError, match="is a link that leads to") as refused:
        ShardSet(location, cache, 10**9).members(0)
    assert str(link) in str(refused.value)


def test_making_room_removes_nothing_through_a_link(shard_folder, tmp_path, victim):
    """Another set's folder that leads elsewhere is not the cache's: neither counted nor emptied."""
    (old := victim.parent / "shard-000000.tar").write_bytes(b"somebody else's shard")
    (victim.parent / "shard-000001.tar.99.part").mkdir()
    before = snapshot(victim.parent)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ("f" * 64)).symlink_to(victim.parent)
    shards = ShardSet(f"file://{shard_folder}", cache)
    limit = 2 * max(reader.raw_data.bytes for reader in shards.readers)
    shards = ShardSet(f"file://{shard_folder}", cache, limit)
    read = [shards.members(number)["json"] for number in range(len(shards))]
    assert read == [ShardSet(shard_folder).members(number)["json"] for number in range(len(shards))]
    assert snapshot(victim.parent) == before
    (victim.parent / "shard-000001.tar.99.part").rmdir()
    old.unlink()


@pytest.mark.parametrize("text", [b'"konversations"', b'"conversations"'], ids=["no record", "no image"])
def test_a_store_that_was_written_wrongly_is_not_blamed_on_the_disk(shard_folder, tmp_path, text):
    """Every checksum is right: somebody wrote these records so."""
    store = copytree(shard_folder, tmp_path / "store")
    tar, sidecar = store / "shard-000000.tar", store / "shard-000000.json"
    changed = tar.read_bytes().replace(b'"conversations"', text)
    changed = changed.replace(b'"member":"', b'"member":"x') if changed == tar.read_bytes() else changed
    data, listed = changed[: tar.stat().st_size], json.loads(sidecar.read_bytes())
    places = list(zip(listed["offsets"], listed["sizes"], strict=True))
    listed["checksums"] = [zlib.crc32(data[offset : offset + size]) for offset, size in places]
    tar.write_bytes(data)
    sidecar.write_text(json.dumps(listed))
    digest = hashlib.sha256(data).hexdigest()
    index, manifest = (json.loads((store / name).read_bytes()) for name in ("index.json", "manifest.json"))
    index["shards"][0]["raw_data"]["hashes"]["sha256"] = manifest["shards"][0]["sha256"] = digest
    (store / "index.json").write_text(json.dumps(index))
    (store / "manifest.json").write_text(json.dumps(manifest))
    believe_listings(store)
    for read in ("members", "record") if b"konv" in text else ("members",):
        with pytest.raises(DamagedShard, match="its checksum is right, so it lies in the store like this") as refused:
            shards = ShardSet(f"file://{store}", tmp_path / "cache", 10**9)
            [getattr(shards, read)(number) for number in range(len(shards))]
        assert "disk" not in str(refused.value)


def test_listings_are_bounded(shard_folder, tmp_path):
    store = copytree(shard_folder, tmp_path / "store")
    os.truncate(store / "index.json", 1 << 40)
    for location in (f"file://{store}", str(store)):
        with pytest.raises(ValueError, match=r"1,099,511,627,776 bytes, and 1,073,741,824 are the most"):
            ShardSet(location, tmp_path / "cache", 10**9)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "info.json")
    with pytest.raises(ValueError, match="info.json is a pipe or a device"):
        within(tmp_path, "info.json")
