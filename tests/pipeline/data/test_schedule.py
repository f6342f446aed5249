"""The plan of a run: the same batches for any number of ranks, each sample once, budgets kept, counts that add up."""

from pathlib import Path

import numpy as np
import pytest

from model.flops import training_flops
from pipeline.config import RunConfig, load_config
from pipeline.data.lengths import LengthTable
from pipeline.data.order import Source, order
from pipeline.data.schedule import Schedule, _order

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "saisa-vicuna-7b-stage2.yaml"
SIZES = (70, 30, 50, 1, 49) * 4
COSTS = ("num_text", "num_images", "num_targets")


def config(**changes: object) -> RunConfig:
    settings = {"train.global_batch_size": 64, "data.shards_in_use": 3, "data.row_multiple": 16, **changes}
    return load_config(CONFIG, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()])


def table(num_samples: int = sum(SIZES), bad: tuple[int, ...] = (5, 77)) -> LengthTable:
    """Lengths like LLaVA's: long-tailed answers, some rows without an image, two that cannot be encoded."""
    generator = np.random.default_rng(0)
    text = np.clip(generator.lognormal(5.0, 0.8, num_samples), 20, 1400).astype(np.int32)
    images = (generator.random(num_samples) > 0.06).astype(np.int32)
    values = np.stack([text, images, text // 2, images, text // 90], axis=1).astype(np.int32)
    values[list(bad)] = 0
    return LengthTable(values, {number: f"record {number}: no" for number in bad})


def schedule(num_ranks: int = 1, sources: list[Source] | None = None, **changes: object) -> Schedule:
    return Schedule(config(**changes), sources or [Source(SIZES)], table(), num_ranks)


def held(plan) -> list[int]:
    return [number for rank in plan.packs for pack in rank for number in pack]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 100])
def test_an_epoch_brings_every_sample_once_in_batches_that_no_number_of_ranks_changes(num_ranks):
    one, many = schedule(), schedule(num_ranks)
    seen = []
    for step in range(many.num_steps):
        plan = many.plan(step)
        assert len(plan.packs) == num_ranks
        assert sorted(held(plan)) == sorted(held(one.plan(step)))
        assert sorted(held(plan) + plan.skipped) == sorted(many.samples(step).tolist())
        seen += held(plan) + plan.skipped
    assert sorted(seen) == list(range(sum(SIZES)))


def test_packs_keep_both_budgets_and_counts_add_up():
    planned = schedule(3, data__max_images_per_pack=5)
    lengths = planned.table
    for step in range(planned.num_steps):
        plan = planned.plan(step)
        rows = [int(lengths.column("num_text")[pack].sum()) for rank in plan.packs for pack in rank]
        images = [int(lengths.column("num_images")[pack].sum()) for rank in plan.packs for pack in rank]
        assert max(rows) <= 4096 and max(images) <= 5
        assert plan.counts.num_text_tokens == sum(rows)
        assert plan.counts.num_padding_tokens == sum(-row % 16 for row in rows)
        assert plan.counts.num_visual_tokens == 576 * sum(images)
        assert plan.counts.num_samples + plan.counts.num_skipped == len(planned.samples(step))
        assert plan.counts.num_targets == lengths.column("num_targets")[planned.samples(step)].sum()
        assert plan.counts.imbalance_fraction < 0.1
        sizes = zip(*(lengths.column(name)[held(plan)].tolist() for name in COSTS), strict=True)
        model, phase = planned.config.model, planned.config.phase
        flops = [training_flops(model, phase, text, images * 576, targets) for text, images, targets in sizes]
        assert plan.counts.training_flops == sum(flops)
    skipped = [number for step in range(planned.num_steps) for number in planned.plan(step).skipped]
    assert sorted(skipped) == [5, 77]


def test_steps_follow_epochs_and_the_last_batch_is_short():
    planned = schedule(train__num_epochs=2)
    assert planned.num_steps == 2 * 13
    assert [planned.plan(step).epoch for step in (0, 12, 13, 25)] == [0, 0, 1, 1]
    assert [len(planned.samples(step)) for step in (11, 12, 13)] == [64, 800 - 12 * 64, 64]
    assert schedule(train__max_steps=5).num_steps == 5
    mixed = schedule(sources=[Source(SIZES[:10], 0.5), Source(SIZES[10:], 2)])
    assert mixed.num_drawn == 200 + 800


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    planned, other = schedule(train__num_epochs=3), schedule(train__num_epochs=3, train__seed=1)
    steps = planned.num_steps // 3
    orders = [np.concatenate([planned.samples(epoch * steps + step) for step in range(steps)]) for epoch in range(3)]
    for epoch, numbers in enumerate(orders):
        assert numbers.tolist() == order(0, epoch, [Source(SIZES)], 3).tolist()
        assert numbers.tolist() != orders[epoch - 1].tolist()
        assert numbers[:64].tolist() != other.samples(epoch * steps).tolist()


def test_samples_ahead_begin_with_the_batch():
    planned = schedule()
    assert planned.samples(3, 100).tolist()[:64] == planned.samples(3).tolist()
    assert planned.samples(3, 100).tolist()[64:] == planned.samples(4).tolist()[:36]


def test_a_plan_needs_no_earlier_plan():
    """Start-up at step 100,000 costs what it costs at step 0: nothing is replayed."""
    far = schedule(train__num_epochs=10_000)
    _order.cache_clear()
    step = 100_000
    assert sorted(held(far.plan(step))) == sorted(held(schedule(4, train__num_epochs=10_000).plan(step)))
    assert _order.cache_info().misses == 1
