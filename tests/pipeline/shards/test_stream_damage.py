"""Damage is loud, or healed: never a hang, a short epoch, or bytes that are not those of the shards."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

import pytest
from streaming.base.storage.download import LocalDownloader
from torch.utils.data import DataLoader, Dataset

import pipeline.shards.tar_reader
import pipeline.shards.tar_stream
from common.console import describe
from pipeline.distributed import worker_context
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.tar_reader import DamagedShard
from tests.full_disk import no_file_larger_than
from tests.s3_server import Bucket
from tests.shard_sets import write_shards

VICTIM = 1
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


class Samples(Dataset):
    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __getitem__(self, number: int) -> dict[str, bytes]:
        return self.shards.members(number)


def read_all(shards: ShardSet, num_workers: int = 0) -> list[dict[str, bytes]]:
    shards.stream.download_retry = 1  # these tests need not wait for better times
    if not num_workers:
        return [shards.members(number) for number in range(len(shards))]
    workers = {"num_workers": num_workers, "timeout": 60, "multiprocessing_context": worker_context()}
    loader = DataLoader(Samples(shards), batch_size=None, sampler=range(len(shards)), **workers)
    iterator: Any = iter(loader)
    try:
        return list(iterator)
    finally:
        iterator._shutdown_workers()  # torch takes 10 seconds for it when it is left to the garbage collector


def flip(path: Path, at: int = -2000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def expected(shard_folder) -> list[dict[str, bytes]]:
    return read_all(ShardSet(shard_folder))


@pytest.fixture
def remote(shard_folder, tmp_path) -> Path:
    """A shard set to damage."""
    return copytree(shard_folder, tmp_path / "remote")


@pytest.fixture
def tar(remote) -> Path:
    return remote / f"shard-{VICTIM:06}.tar"


def open_cached(remote: Path) -> ShardSet:
    return ShardSet(f"file://{remote}", remote.parent / "cache")


@WORKERS
def test_a_corrupt_remote_shard(remote, tar, num_workers):
    flip(tar)
    shards = open_cached(remote)
    with pytest.raises(DamagedShard, match=f"{tar} has another SHA-256 than in index.json; delete it and run `make sh"):
        read_all(shards, num_workers)
    assert not shards.readers[VICTIM].path.exists() and not list(remote.parent.rglob("*.part"))


@WORKERS
def test_a_missing_remote_shard(remote, tar, num_workers):
    tar.unlink()
    with pytest.raises(OSError, match="cannot be fetched into .*cache.*: No such file or directory.*shard-000001.tar"):
        read_all(open_cached(remote), num_workers)


def test_what_prefetch_could_not_fetch_is_told_at_the_read(remote, tar):
    shards = open_cached(remote)
    tar.rename(tar.with_suffix(".away"))
    shards.stream.download_retry = 1
    shards.prefetch([VICTIM])
    with pytest.raises(OSError, match="cannot be fetched"):
        shards.members(shards._ends[0])
    tar.with_suffix(".away").rename(tar)
    assert shards.members(shards._ends[0])["json"]


@WORKERS
@pytest.mark.parametrize("damage", ["flipped", "cut", "sidecar", "gone sidecar"])
def test_damage_in_the_cache_is_healed_after_a_restart(remote, expected, num_workers, damage):
    first = open_cached(remote)
    read_all(first)
    reader = first.readers[VICTIM]
    if damage == "flipped":
        flip(reader.path)
    elif damage == "cut":
        os.truncate(reader.path, 2000)
    elif damage == "sidecar":
        flip(reader.sidecar_path, 100)
    else:
        reader.sidecar_path.unlink()
    again = open_cached(remote)
    assert read_all(again, num_workers) == expected
    assert reader.path.read_bytes() == (remote / reader.path.name).read_bytes()
    assert reader.sidecar_path.read_bytes() == (remote / reader.sidecar_path.name).read_bytes()


def test_damage_in_the_cache_while_it_is_read(remote, expected):
    shards = open_cached(remote)
    read_all(shards)
    flip(shards.readers[VICTIM].path)
    tars = {path.name: path.stat().st_mtime_ns for path in remote.parent.glob("cache/*/*.tar")}
    assert read_all(shards) == expected
    fetched = [path.name for path in remote.parent.glob("cache/*/*.tar") if path.stat().st_mtime_ns != tars[path.name]]
    assert fetched == ["shard-000001.tar"]


def test_a_machine_that_cannot_read_what_is_right(remote, monkeypatch):
    shards = open_cached(remote)
    monkeypatch.setattr(pipeline.shards.tar_reader, "crc32", lambda data: 0)
    with pytest.raises(DamagedShard, match=r"sample 0 \(key 000000000\) is damaged \(checksum\); .* suspect the disk"):
        shards.members(0)


@WORKERS
def test_a_corrupt_local_shard(remote, tar, num_workers):
    shards = ShardSet(remote)
    number, sidecar = shards._ends[VICTIM - 1] + 1, shards.readers[VICTIM].sidecar()
    flip(tar, sidecar["offsets"][1] + 700)
    message = rf"{tar}: sample 1 \(key {sidecar['keys'][1]}\) is damaged \(checksum\); delete this tar and run `make"
    with pytest.raises(DamagedShard, match=message):
        read_all(shards, num_workers)
    shards.members(number - 1)
    flip(tar, sidecar["offsets"][1] + 130)  # the size of its record
    with pytest.raises(DamagedShard, match=r"sample 1 \(key .*\) is damaged"):
        shards.record(number)


def test_a_local_shard_that_is_cut_or_gone(remote, tar):
    os.truncate(tar, 2000)
    with pytest.raises(DamagedShard, match="shard-000001.tar has 2,000 bytes instead of .*; delete it and run `make"):
        read_all(ShardSet(remote))
    shards = ShardSet(remote)
    last = len(shards) - 1
    shards.members(last)
    os.truncate(shards.readers[-1].path, 2000)  # while it is open
    with pytest.raises(DamagedShard, match=r"sample \d \(key 0000000\d\d\) is cut short"):
        shards.members(last)
    tar.unlink()
    with pytest.raises(DamagedShard, match="shard-000001.tar is not there"):
        read_all(ShardSet(remote))


def test_a_wrong_sidecar(remote):
    sidecar = remote / f"shard-{VICTIM:06}.json"
    flip(sidecar, 100)
    for shards in (ShardSet(remote), open_cached(remote)):
        with pytest.raises(DamagedShard, match=f"{sidecar} has another SHA-256 than in index.json; delete it and run"):
            read_all(shards)


def test_other_shards_at_the_same_place(remote, expected, tmp_path):
    """A cache is that of the shards, not that of the place; a job that began with the old ones does not mix them."""
    job = open_cached(remote)
    read_all(job)
    other = write_shards(tmp_path / "other", tmp_path / "work", seed=1)
    remote.rename(tmp_path / "old")
    other.rename(remote)
    again = open_cached(remote)
    assert read_all(again) == read_all(ShardSet(remote)) != expected
    assert again.stream.local != job.stream.local and read_all(job) == expected
    job.readers[0].path.unlink()
    job._files.clear()
    with pytest.raises(DamagedShard, match="shard-000000.tar has .* index.json|shard-000000.tar has .* instead of"):
        read_all(job)


def test_a_full_disk_is_that_of_the_cache(remote):
    shards = open_cached(remote)
    with no_file_larger_than(10_000), pytest.raises(OSError) as full:
        read_all(shards)
    told = f"{shards.stream.local}: shard-000000.tar cannot be fetched into it: File too large; no file may be"
    assert describe(full.value).startswith(told)
    assert not list(remote.parent.rglob("*.part"))


def test_a_store_that_cannot_be_reached(shard_folder, tmp_path, s3: Bucket, monkeypatch):
    s3.upload(shard_folder, "shards")
    shards = ShardSet(f"{s3.url}/shards", tmp_path)
    s3.delete("shards/shard-000001.tar")
    with pytest.raises(OSError, match="Object s3://.*/shards/shard-000001.tar not found"):
        read_all(shards)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    pipeline.shards.tar_stream._downloader.cache_clear()
    with pytest.raises(OSError, match='Could not connect to the endpoint URL: "http://127.0.0.1:1'):
        read_all(shards)


def _reader_that_never_ends(location: str, cache: Path, started: Connection) -> None:
    """Two processes that hang in the middle of a download, of which each tells `started`."""
    os.setsid()
    child = os.fork()

    def download(self, remote: str, local: str, timeout: float) -> None:
        Path(f"{local}.tmp").write_bytes(Path(remote).read_bytes()[:10_000])
        started.send_bytes(b".")
        signal.pause()

    shards = ShardSet(location, cache)
    shards.members(0)
    LocalDownloader._download_file_impl = download
    shards.members(len(shards) - 1 if child else shards._ends[VICTIM])


def test_a_killed_process_group_leaves_nothing_that_matters(remote, expected):
    context, cache = worker_context(), remote.parent / "cache"
    started, told = context.Pipe(duplex=False)
    leader = context.Process(target=_reader_that_never_ends, args=(f"file://{remote}", cache, told))
    leader.start()
    assert started.recv_bytes() + started.recv_bytes() == b".." and leader.pid
    maps = Path(f"/proc/{leader.pid}/maps").read_text()
    assert "/dev/shm" not in maps, "it shares memory, which outlives it"
    os.killpg(leader.pid, signal.SIGKILL)
    leader.join()
    assert len(list(cache.rglob("*.part"))) == 2
    largest = max(path.stat().st_size for path in remote.glob("*.tar"))
    shards = ShardSet(f"file://{remote}", cache, 3 * largest)
    assert read_all(shards) == expected
    assert not list(cache.rglob("*.part"))
    numbers = Random(0).sample(range(len(shards)), len(shards))
    assert [shards.members(number) for number in numbers] == [expected[number] for number in numbers]
