"""Global batches: the same samples however many ranks, every image decoded once, nothing skipped in silence."""

from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from model.pack import IGNORE_INDEX
from pipeline.data import BatchSource
from pipeline.order import order
from pipeline.shards import ShardSet
from pipeline.start import load_image_processor


def source(config, rank: int = 0, num_ranks: int = 1, shards: ShardSet | None = None) -> BatchSource:
    tokenizer = AutoTokenizer.from_pretrained(config.init.base)
    processor = load_image_processor(config.init.base, config.data.image_aspect_ratio)
    return BatchSource(config, shards or ShardSet(config.data.shards), tokenizer, processor, rank, num_ranks)


def texts(batch) -> Counter:
    """The samples of a batch by their token ids."""
    found = Counter()
    for micro_batch in batch.micro_batches:
        for ids in micro_batch.pack.token_ids_T.split(micro_batch.pack.text_lengths):
            found[tuple(ids.tolist())] += 1
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 11])
def test_ranks_share_out_the_batch_of_one(stage2, num_ranks):
    whole = source(stage2).batch(1)
    parts = [source(stage2, rank, num_ranks).batch(1) for rank in range(num_ranks)]
    assert all(part.counts == whole.counts for part in parts)
    shared = sum((texts(part) for part in parts), Counter())
    empty = Counter({(0,): shared[(0,)]}) if (0,) in shared else Counter()  # packs for ranks that got none
    assert shared - empty == texts(whole)
    pixels = [sum(len(m.pixels_B3HW) for m in part.micro_batches) for part in (whole, *parts)]
    assert pixels[0] == sum(pixels[1:])


def test_an_epoch_has_every_sample_once_and_counts_add_up(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, train__max_steps="null", data__template="v1")
    batches = list(source(config).batches(0))
    assert sum(batch.counts.num_samples for batch in batches) == len(ShardSet(config.data.shards))
    for batch in batches:
        packs = [m.pack for m in batch.micro_batches]
        assert sum(pack.num_targets for pack in packs) == batch.counts.num_targets
        assert sum(len(pack.token_ids_T) for pack in packs) == batch.counts.num_text_tokens
        assert all(len(pack.token_ids_T) <= config.data.max_text_tokens_per_pack for pack in packs)
        for pack, pixels in ((m.pack, m.pixels_B3HW) for m in batch.micro_batches):
            assert pixels.dtype == torch.uint8 and len(pixels) == sum(pack.image_counts) == len(pack.image_positions)


def test_reading_ahead_changes_nothing(stage2):
    ahead = stage2.model_copy(update={"data": stage2.data.model_copy(update={"prefetch_steps": 3})})
    for first, second in zip(source(stage2).batches(1), source(ahead).batches(1), strict=True):
        assert (first.step, first.counts, texts(first)) == (second.step, second.counts, texts(second))


def test_a_sample_that_cannot_be_encoded_is_skipped_counted_and_named(stage2, monkeypatch):
    shards = ShardSet(stage2.data.shards)
    bad = shards.record(int(order(stage2.train.seed, 0, shards.shard_sizes)[0]))["id"]
    real = shards.record

    def record(number: int) -> dict:
        found = real(number)
        return found | {"conversations": found["conversations"][:1]} if found["id"] == bad else found

    monkeypatch.setattr(shards, "record", record)
    batches = list(source(stage2, shards=shards).batches(0))
    (batch,) = [batch for batch in batches if batch.problems]
    assert batch.counts.num_skipped == 1 and bad in batch.problems[0]
    assert sum(texts(batch).values()) == batch.counts.num_samples == stage2.train.global_batch_size - 1


def test_targets_are_answers_only(stage2):
    tokenizer = AutoTokenizer.from_pretrained(stage2.init.base)
    answers = {turn["value"] for turn in _turns(stage2.data.shards) if turn["from"] == "gpt"}
    (micro_batch, *_) = source(stage2).batch(0).micro_batches
    targets = micro_batch.pack.targets_T
    said = tokenizer.decode(targets[targets != IGNORE_INDEX]).split(tokenizer.eos_token)
    assert {text.strip() for text in said if text} <= answers


def _turns(folder) -> list[dict]:
    shards = ShardSet(folder)
    return [turn for number in range(len(shards)) for turn in shards.record(number)["conversations"]]
