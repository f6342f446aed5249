"""Global batches: the same samples however many ranks, every image decoded once, nothing skipped in silence."""

import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoTokenizer

from model.pack import IGNORE_INDEX
from pipeline.config import RunConfig, ShardSource
from pipeline.data.batches import BatchSource, RankCoordinates, build_pack, build_source, load_table, open_shards
from pipeline.data.lengths import COLUMNS
from pipeline.data.samples import build_sample
from pipeline.shards.shard_set import ShardSet
from tests.processes import run_together


def source(config: RunConfig, rank: int = 0, num_ranks: int = 1) -> BatchSource:
    sets = open_shards(config)
    return build_source(config, sets, load_table(config, sets, Console(quiet=True)), RankCoordinates(rank, num_ranks))


@contextmanager
def started() -> Iterator[list[BaseProcess]]:
    """Gives the child processes that the block has started; a test before may have left others."""
    before, found = set(active_children()), []
    yield found
    found.extend(set(active_children()) - before)


def with_data(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def the_shards(config: RunConfig) -> ShardSet:
    (shards,) = open_shards(config)
    return shards


def texts(batch) -> Counter:
    """The samples of a batch by their token ids."""
    found = Counter()
    for micro_batch in batch.micro_batches:
        for ids in micro_batch.pack.token_ids_T.split(micro_batch.pack.text_lengths):
            found[tuple(ids.tolist())] += 1
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 11])
def test_ranks_share_out_the_batch_of_one(stage2, num_ranks):
    whole = source(stage2)[1]
    parts = [source(stage2, rank, num_ranks)[1] for rank in range(num_ranks)]
    same = {"imbalance_fraction": 0.0}  # the rest of the counts does not depend on the ranks
    assert all(replace(part.counts, **same) == replace(whole.counts, **same) for part in parts)
    shared = sum((texts(part) for part in parts), Counter())
    empty = Counter({(0,): shared[(0,)]}) if (0,) in shared else Counter()  # packs for ranks that got none
    assert shared - empty == texts(whole)
    pixels = [sum(len(m.pixels_B3HW) for m in part.micro_batches) for part in (whole, *parts)]
    assert pixels[0] == sum(pixels[1:])


def test_an_epoch_has_every_sample_once_and_counts_add_up(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, train__max_steps="null", data__template="v1")
    batches = list(source(config).batches(0))
    assert sum(batch.counts.num_samples for batch in batches) == len(the_shards(config))
    for batch in batches:
        packs = [m.pack for m in batch.micro_batches]
        assert sum(pack.num_targets for pack in packs) == batch.counts.num_targets
        assert sum(len(pack.token_ids_T) for pack in packs) == batch.counts.num_text_tokens
        assert all(len(pack.token_ids_T) <= config.data.max_text_tokens_per_pack for pack in packs)
        for pack, pixels in ((m.pack, m.pixels_B3HW) for m in batch.micro_batches):
            assert pixels.dtype == torch.uint8 and len(pixels) == sum(pack.image_counts) == len(pack.image_positions)


@pytest.mark.parametrize("changes", [{"prefetch_steps": 3}, {"num_workers": 1}, {"num_workers": 3}])
def test_threads_and_worker_processes_change_nothing(stage2, changes):
    plain = with_data(stage2, prefetch_steps=0)
    for first, second in zip(source(plain).batches(1), source(with_data(stage2, **changes)).batches(1), strict=True):
        assert (first.step, first.counts, texts(first)) == (second.step, second.counts, texts(second))
        for one, two in zip(first.micro_batches, second.micro_batches, strict=True):
            assert torch.equal(one.pixels_B3HW, two.pixels_B3HW)


def test_a_sample_that_cannot_be_encoded_is_skipped_counted_and_named(stage2, monkeypatch, tmp_path):
    bad = source(stage2).schedule.samples(0)[3]
    real = ShardSet.records
    bad_id = the_shards(stage2).record(bad)["id"]

    def records(self, shard):
        for record in real(self, shard):
            yield record | {"conversations": record["conversations"][:1]} if record["id"] == bad_id else record

    monkeypatch.setattr(ShardSet, "records", records)
    batches = list(source(with_data(stage2, cache=tmp_path)).batches(0))
    (batch,) = [batch for batch in batches if batch.problems]
    assert batch.step == 0 and batch.counts.num_skipped == 1 and bad_id in batch.problems[0]
    assert sum(texts(batch).values()) == batch.counts.num_samples == stage2.train.global_batch_size - 1


@pytest.mark.parametrize("column", COLUMNS)
def test_a_table_of_another_encoding_is_noticed_at_each_sample(stage2, column):
    found = source(stage2)
    number = int(found.schedule.samples(0)[2])
    found.schedule.table.values[number, COLUMNS.index(column)] += 1
    name = re.escape(the_shards(stage2).record(number)["id"])
    wrong = rf"record {name} \(index \d+\) has {column}=\d+, but the length table says \d+; delete lengths-\*\.npz in "
    with pytest.raises(ValueError, match=wrong):
        found[0]


def test_samples_without_targets_are_counted_and_the_first_is_named(stage2, tmp_path):
    """At 150 positions (64 of them an image) some answers are cut; the samples themselves say which."""
    short = with_data(stage2, cache=tmp_path, max_positions=150)
    (shards,) = open_shards(short)
    tokenizer, v = source(stage2).tokenizer, stage2.model.num_tokens_per_image
    samples = [build_sample(shards.record(n), "v1", tokenizer, v, 150) for n in range(len(shards))]
    idle = [n for n, sample in enumerate(samples) if not (sample.targets != IGNORE_INDEX).any()]
    cut = source(short)
    assert 0 < len(idle) < len(shards)
    for step in range(6):
        held = set(cut.schedule.samples(step).tolist())
        assert cut.schedule.plan(step).counts.num_without_targets == len(held & set(idle))
    (line,) = cut.remarks()
    assert line.startswith(f"{len(idle)} of {len(shards)} samples will teach nothing, {len(idle)} since data.max_pos")
    assert f"the first is record {shards.record(idle[0])['id']} (index " in line
    assert source(stage2).remarks() == []


def test_an_image_that_does_not_decode_names_the_record(stage2, monkeypatch):
    def sample(self, number):
        record, found = real(self, number)
        return record, {name: data if name == "json" else data[:60] for name, data in found.items()}

    real = ShardSet.sample
    monkeypatch.setattr(ShardSet, "sample", sample)
    with pytest.raises(ValueError, match=r"record \S+ \(index \d+\), image \S+ does not decode"):
        source(stage2)[0]


def test_an_error_in_a_worker_process_ends_the_run(stage2):
    broken = source(with_data(stage2, num_workers=1, prefetch_steps=1))
    broken.schedule.table.values[:, 0] += 1
    with started() as readers, pytest.raises(ValueError, match="length table"):
        list(broken.batches(0))
    assert not readers  # the worker too has ended, and is not waited for later


def test_readers_outlive_the_sigterm_of_their_group(stage2):
    batches = source(with_data(stage2, num_workers=2, prefetch_steps=1)).batches(0)
    with started() as children:
        assert next(batches).step == 0
    readers = [psutil.Process(each.pid) for each in children]
    servers = {reader.parent() for reader in readers}  # and the one that they are forked from
    assert len(readers) == 2 and len(servers) == 1 and psutil.Process() not in servers
    subprocess.run(["kill", *(str(each.pid) for each in (*servers, *readers) if each)], check=True)
    assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]


def test_readers_end_with_a_trainer_that_does_not_wait_for_them(stage2):
    batches = source(with_data(stage2, num_workers=1, prefetch_steps=1)).batches(0)
    with started() as readers:
        next(batches)
    (reader,) = readers
    reader.terminate()
    reader.join(60)
    assert not reader.is_alive()


def read_and_die(config: RunConfig) -> None:
    """What a trainer does that is killed while its readers work: tells who they are, and ends."""
    batches = source(with_data(config, num_workers=2, prefetch_steps=1)).batches(0)
    next(batches)
    (config.run_dir / "readers").write_text(" ".join(str(each.pid) for each in active_children()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_readers_end_when_their_trainer_is_killed(stage2, tmp_path):
    config = stage2.model_copy(update={"run_dir": tmp_path})
    with pytest.raises(RuntimeError, match="died"):
        run_together(1, read_and_die, config)
    readers = [int(pid) for pid in (tmp_path / "readers").read_text().split()]
    assert len(readers) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in readers if psutil.pid_exists(pid)], timeout=60)
    assert not alive


def test_a_mixture_repeats_and_halves_its_sources(stage2, tmp_path):
    location = {"location": str(stage2.data.shards[0].location)}
    changes = {"data__shards": [location | {"repeat": 2.0}, location | {"repeat": 0.5}]}
    values = stage2.model_dump() | {}
    values["data"]["shards"] = changes["data__shards"]
    values["train"]["max_steps"] = None
    values["train"]["num_epochs"] = 1
    mixed = source(RunConfig.model_validate(values))
    num_samples = len(the_shards(stage2))
    counts = Counter(number for step in range(mixed.num_steps) for number in mixed.schedule.samples(step).tolist())
    assert [counts[number] for number in range(num_samples)] == [2] * num_samples
    assert sum(counts[number] for number in range(num_samples, 2 * num_samples)) == num_samples // 2
    shards, local = mixed.samples.locate(num_samples + 3)
    assert local == 3 and shards is mixed.samples.sets[1]
    assert sum(batch.counts.num_samples for batch in mixed.batches(mixed.num_steps - 2)) > 0


def test_padding_rows_have_no_target_and_stand_alone(stage2):
    found = source(stage2)
    record = the_shards(stage2).record(0)
    v = stage2.model.num_tokens_per_image
    sample = build_sample(record, stage2.data.template, found.tokenizer, v, stage2.data.max_positions)
    pack, padded = (build_pack([sample], v, multiple) for multiple in (1, 64))
    num_rows = len(pack.token_ids_T)
    assert len(padded.token_ids_T) == 64 * -(-num_rows // 64) and padded.num_targets == pack.num_targets
    assert padded.text_lengths == [num_rows, -num_rows % 64] and padded.image_counts == [*pack.image_counts, 0]
    assert torch.equal(padded.token_ids_T[:num_rows], pack.token_ids_T)
    assert torch.equal(padded.masks[0], pack.masks[0])


def test_exact_images_are_pillows_own(world, photo_shards, tmp_path):
    """A JPEG is decoded otherwise without `data.exact_images`, and then a few values differ."""
    plain = world.config("demo-stage2", tmp_path, data__shards=photo_shards, init__projector="base")
    differing = []
    for exact in (True, False):
        found = source(with_data(plain, exact_images=exact))
        (shards,) = found.samples.sets
        pixels = torch.cat([micro_batch.pixels_B3HW for micro_batch in found[0].micro_batches])
        numbers = [number for pack in found.schedule.plan(0).packs[0] for number in pack]
        paths = [image["path"] for number in numbers for image in shards.record(number)["images"]]
        images = [Image.open(photo_shards.parent / path) for path in paths]
        expected = torch.stack([found.image_processor.resize_to_uint8(image) for image in images])
        differing.append(int((pixels != expected).sum()))
    assert differing[0] == 0 < differing[1]


def test_the_cache_of_a_run_keeps_its_limit(stage2, shard_folder, tmp_path):
    limit = 3 * max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    changes = {"shards": (ShardSource(location=f"file://{shard_folder}"),), "cache": tmp_path, "cache_limit": limit}
    shards = the_shards(with_data(stage2, **changes, shards_in_use=2))
    for number in range(len(shards)):
        shards.members(number)
        assert 0 < sum(tar.stat().st_size for tar in tmp_path.glob("*/*.tar")) <= limit


def test_more_shards_at_a_time_than_the_cache_holds_are_refused(stage2, shard_folder, tmp_path):
    largest = max(tar.stat().st_size for tar in shard_folder.glob("*.tar"))
    changes = {"shards": (ShardSource(location=f"file://{shard_folder}"),), "cache": tmp_path, "shards_in_use": 3}
    open_shards(with_data(stage2, **changes, cache_limit=3 * largest))
    with pytest.raises(ValueError, match="holds fewer shards than data.shards_in_use=3: they have up to"):
        open_shards(with_data(stage2, **changes, cache_limit=3 * largest - 1))


def test_a_rank_without_samples_gets_a_pack_without_targets(stage2):
    (nothing,) = source(stage2, 19, 20)[0].micro_batches
    assert nothing.pack.num_targets == 0 and len(nothing.pixels_B3HW) == 0


def test_targets_are_answers_only(stage2):
    tokenizer = AutoTokenizer.from_pretrained(stage2.init.base)
    answers = {turn["value"] for turn in _turns(stage2) if turn["from"] == "gpt"}
    (micro_batch, *_) = source(stage2)[0].micro_batches
    targets = micro_batch.pack.targets_T
    said = tokenizer.decode(targets[targets != IGNORE_INDEX]).split(tokenizer.eos_token)
    assert {text.strip() for text in said if text} <= answers


def _turns(config: RunConfig) -> list[dict]:
    shards = the_shards(config)
    return [turn for number in range(len(shards)) for turn in shards.record(number)["conversations"]]
