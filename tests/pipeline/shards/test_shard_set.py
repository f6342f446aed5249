"""Reading by number: the samples of the tars, from a folder and through a cache, by any process and thread."""

import io
import json
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import botocore.endpoint
import pytest
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset

import pipeline.shards.shard_cache
from data_prep.tar_writer import tar_sample
from pipeline.distributed import worker_context
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.tar_reader import split_members
from tests.s3_server import Bucket
from tests.shard_sets import LONG_ANSWER, NUM_SAMPLES

NO_WAIT = SimpleNamespace(sleep=lambda seconds: None)
"""In place of `time` where botocore waits before it asks again."""


def everything(shards: ShardSet) -> list[dict[str, bytes]]:
    return [shards.members(number) for number in range(len(shards))]


def cached_tars(shards: ShardSet) -> set[str]:
    return {path.name for path in Path(shards.stream.local).glob("*.tar")}


def names(shards: ShardSet, *numbers: int) -> set[str]:
    return {shards.readers[number].path.name for number in numbers}


def wait_for_prefetch() -> None:
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join()


def test_samples_by_number_are_the_samples_of_the_tars(shard_folder):
    shards = ShardSet(shard_folder)
    tars = sorted(str(tar) for tar in shard_folder.glob("*.tar"))
    streamed = [
        {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in WebDataset(tars, shardshuffle=False)
    ]
    assert len(shards) == NUM_SAMPLES == sum(shards.shard_sizes) and len(shards.shard_sizes) > 5
    assert everything(shards) == streamed
    assert sorted(len(members) for members in streamed)[:2] == [1, 2]  # one record has no image


def test_members_are_those_that_tarfile_finds_whatever_their_size():
    """A member of whole blocks has no padding behind it."""
    members = {f"{size}.bin": b"x" * size for size in (0, 1, 511, 512, 513, 1024, 1025)}
    blocks = tar_sample("000000001", members.items())
    with tarfile.open(fileobj=io.BytesIO(blocks)) as tar:
        found = {member.name: tar.extractfile(member) for member in tar}
    assert split_members(blocks) == members
    assert {name.partition(".")[2]: file.read() for name, file in found.items() if file} == members


@pytest.mark.parametrize("through", ["in place", "cache", "ranges"])
def test_records_are_read_without_images(shard_folder, tmp_path, through):
    location = shard_folder if through == "in place" else f"file://{shard_folder}"
    shards = ShardSet(location, tmp_path / "cache")
    expected = [json.loads(members["json"]) for members in everything(ShardSet(shard_folder))]
    if through == "cache":
        assert [shards.record(number) for number in range(len(shards))] == expected
    assert [record for shard in range(len(shards.shard_sizes)) for record in shards.records(shard)] == expected
    assert max(len(record["conversations"][1]["value"]) for record in expected) == len(LONG_ANSWER) > 8192
    assert bool(cached_tars(shards)) == (through != "ranges") or through == "in place"


def test_a_number_that_is_not_there_is_not_another(shard_folder):
    shards = ShardSet(shard_folder)
    for number in (-1, len(shards)):
        with pytest.raises(IndexError, match=f"no sample {number}, only {NUM_SAMPLES}"):
            shards.members(number)


def test_unfinished_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no shards here; name what `make shards` wrote"):
        ShardSet(tmp_path)


def test_a_url_needs_a_cache_of_two_shards(shard_folder, tmp_path):
    location, largest = f"file://{shard_folder}", max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    with pytest.raises(ValueError, match="need a folder to be cached in"):
        ShardSet(location)
    with pytest.raises(ValueError, match=f"limit of 9,999 bytes does not hold two shards; it must be {2 * largest:,}"):
        ShardSet(location, tmp_path, 9999)
    with pytest.raises(ValueError, match="Unsupported remote path: gopher://shards"):
        ShardSet("gopher://shards", tmp_path)


def test_a_set_works_where_it_is_sent(shard_folder, tmp_path):
    expected = everything(ShardSet(shard_folder))
    shards = ShardSet(f"file://{shard_folder}", tmp_path)
    assert shards.members(0) == expected[0]  # its files and threads stay here
    shards.prefetch([1])
    copy = pickle.loads(pickle.dumps(shards))
    copy.prefetch([2])
    wait_for_prefetch()
    assert everything(copy) == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shards.members, range(len(shards)))) == expected


def adopt(environment: dict[str, str], worker: int) -> None:
    """Gives a worker the environment that leads to the S3 server, and lets it ask again at once."""
    os.environ.update(environment)
    botocore.endpoint.time = NO_WAIT


class Samples(Dataset):
    """What a training data set does: it says what comes next, and reads."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __getitem__(self, number: int) -> dict[str, bytes]:
        self.shards.prefetch([0, 1, 2])
        return self.shards.members(number)


def test_workers_read_what_one_process_reads(shard_folder, tmp_path):
    largest = max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    shards = ShardSet(f"file://{shard_folder}", tmp_path, 3 * largest)
    samples = Samples(shards)
    samples[5]  # opens a file and starts threads, which workers must not take for theirs
    numbers = Random(0).sample(range(len(shards)), len(shards))
    workers = {"num_workers": 2, "timeout": 60, "multiprocessing_context": worker_context()}
    loader = DataLoader(samples, batch_size=None, sampler=numbers, **workers)
    expected = everything(ShardSet(shard_folder))
    assert list(loader) == [expected[number] for number in numbers]


def test_no_lock_is_taken_for_a_sample(shard_folder, tmp_path, monkeypatch):
    taken = []

    class CountedLock(pipeline.shards.shard_cache.FileLock):
        def acquire(self, *args, **kwargs):
            taken.append(self.lock_file)
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(pipeline.shards.shard_cache, "FileLock", CountedLock)
    in_place, cached = ShardSet(shard_folder), ShardSet(f"file://{shard_folder}", tmp_path)
    everything(in_place)
    assert not taken
    everything(cached)
    assert len(taken) == len(set(taken)) == 2 * len(cached.shard_sizes)  # a tar and a sidecar each, fetched once
    taken.clear()
    everything(cached)
    assert not taken


def test_the_least_recently_used_shard_makes_way(shard_folder, tmp_path):
    sizes = [tar.stat().st_size for tar in sorted(shard_folder.glob("*.tar"))]
    limit = 3 * max(sizes)
    location, firsts = f"file://{shard_folder}", [0, *ShardSet(shard_folder)._ends]
    shards = ShardSet(location, tmp_path, limit)
    for shard in range(3):
        shards.members(firsts[shard])
    os.utime(shards.readers[1].path, (1, 1))
    again = ShardSet(location, tmp_path, limit)  # a new job, which has no file open
    again.members(firsts[0])  # now used later than 2
    again.members(firsts[3])
    assert cached_tars(shards) == names(shards, 0, 2, 3)
    os.utime(shards.readers[0].path, (1, 1))
    again.members(firsts[4])
    assert cached_tars(shards) == names(shards, 0, 3, 4), "0 is the oldest but open"
    assert shards.members(firsts[1]) == again.members(firsts[1]), "the first job still holds it"
    for shard, first in enumerate(firsts[:-1]):
        again.members(first)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= limit, shard


def test_the_limit_is_that_of_all_sets_in_a_cache(shard_folder, tmp_path):
    limit = 3 * max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    old, not_ours = (tmp_path / name / "shard-000000.tar" for name in ("0" * 64, "images"))
    for tar in (old, not_ours):
        tar.parent.mkdir()
        tar.write_bytes(bytes(limit))
        os.utime(tar, (1, 1))
    ShardSet(f"file://{shard_folder}", tmp_path, limit).members(0)
    assert not old.exists() and not_ours.exists()


def test_prefetch_fills_the_cache_in_order_and_no_further(shard_folder, tmp_path):
    limit = 3 * max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    shards = ShardSet(f"file://{shard_folder}", tmp_path, limit)
    shards.prefetch([5, 4, 3, 2, 1, 0], threads=1)
    wait_for_prefetch()
    assert cached_tars(shards) == names(shards, 5, 4, 3)
    shards.prefetch([4, 2], threads=1)  # 5 has been passed by
    wait_for_prefetch()
    assert cached_tars(shards) >= names(shards, 4, 2)
    in_place = ShardSet(shard_folder)
    in_place.prefetch([0])
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_leaves_to_others_what_they_fetch(shard_folder, tmp_path):
    shards = ShardSet(f"file://{shard_folder}", tmp_path)
    assert shards.stream.cache
    with shards.stream.cache.locked("shard-000000.tar"):
        shards.prefetch([0, 1], threads=1)
        wait_for_prefetch()
        assert cached_tars(shards) == names(shards, 1)


def _read_all(location: str, cache: Path, limit: int, seed: int, expected: list[dict[str, bytes]]) -> None:
    shards = ShardSet(location, cache, limit)
    for number in Random(seed).choices(range(len(shards)), k=60):
        assert shards.members(number) == expected[number]


def test_processes_share_a_cache(shard_folder, tmp_path):
    """Two processes with room for two shards between them, each evicting what the other reads."""
    limit = 2 * max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    arguments = (f"file://{shard_folder}", tmp_path, limit)
    expected, context = everything(ShardSet(shard_folder)), worker_context()
    readers = [context.Process(target=_read_all, args=(*arguments, seed, expected)) for seed in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert not list(tmp_path.rglob("*.part"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= limit


def test_s3_that_fails_now_and_then(shard_folder, tmp_path, s3: Bucket, monkeypatch):
    s3.upload(shard_folder, "shards")
    monkeypatch.setattr("botocore.endpoint.time", NO_WAIT)
    limit = 2 * max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    with s3.server.watched(fail_every=3) as requests:
        shards = ShardSet(f"{s3.url}/shards", tmp_path, limit)
        records = [record for shard in (0, 1) for record in shards.records(shard)]
        assert not cached_tars(shards)
        first, second = shards._ends[0], shards._ends[3]
        found = [shards.members(number) for number in range(first, second)]
    expected = everything(ShardSet(shard_folder))
    assert found == expected[first:second]
    rest = range(second, len(shards))
    workers = {"num_workers": 2, "timeout": 60, "multiprocessing_context": worker_context()}
    workers["worker_init_fn"] = partial(adopt, dict(os.environ))  # the fork server may be older than the S3 server
    assert list(DataLoader(Samples(shards), batch_size=None, sampler=rest, **workers)) == expected[second:]
    assert records == [shards.record(number) for number in range(len(records))]
    assert sum(request.failed for request in requests) > 5
    assert {request.path for request in requests if request.path.endswith(".tar")} == {
        f"/{s3.name}/shards/{reader.raw_data.basename}" for reader in shards.readers[:4]
    }
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= limit


def test_one_setting_leads_to_the_store(s3: Bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="S3_ENDPOINT_URL=http://127.0.0.1:1 but .*; set AWS_ENDPOINT_URL alone"):
        ShardSet(f"{s3.url}/shards", tmp_path)
