"""A sample whose image does not decode: as if it were not there, on one process or two; not one more than allowed."""

from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch

from common.console import describe
from pipeline import loop
from pipeline.bad_samples import FILE, BadSample, check_bad_samples, read_bad_samples
from pipeline.config import RunConfig
from pipeline.data import batches
from pipeline.data.batches import BatchSource
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from pipeline.step import train_step
from tests.full_disk import no_file_larger_than
from tests.pipeline.test_parallel import assert_same_run
from tests.processes import run_together

BAD = 2  # of the samples of the first step that have an image, the first two


def with_bad_images(config: RunConfig, skip: bool, num_later: int = 0, killed_at: int | None = None) -> None:
    """Trains where two samples have a bad image, or (`skip`) where the table says of them that they have no text.

    Of those that stand in the first step twice, if any do; and so `num_later` of the second step alone.
    """
    real = BatchSource.__init__

    def init(self, *args) -> None:
        real(self, *args)
        table = self.schedule.table
        drawn = Counter(n for n in self.schedule.samples(0).tolist() if table.column("num_images")[n])
        numbers = [number for number, _ in drawn.most_common(BAD)]
        later = (n for n in self.schedule.samples(1).tolist() if table.column("num_images")[n] and n not in drawn)
        numbers += list(islice(later, num_later))
        if skip:
            table.values[numbers] = 0
            table.problems.update((number, "left out") for number in numbers)
        self.bad = numbers

    real_read = BatchSource._read

    def read(self, number):
        sample, stored = real_read(self, number)
        return sample, [image._replace(data=image.data[:60]) if number in self.bad else image for image in stored]

    def step(state, batch, wait_seconds):
        if batch.step == killed_at:
            raise RuntimeError("killed")
        return train_step(state, batch, wait_seconds)

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "train_step", step)
    patch.setattr(BatchSource, "__init__", init)
    patch.setattr(batches.BatchSource, "_read", read)
    try:
        train(config)
    finally:
        patch.undo()


def settings(config: RunConfig, run_dir: Path, limit: int, **parallel: int) -> RunConfig:
    values = config.model_dump() | {"run_dir": run_dir, "parallel": parallel}
    values["data"]["max_bad_samples"] = limit
    values["train"]["max_steps"] = 2
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(("num_processes", "parallel"), [(1, {}), (2, {}), (2, {"pp": 2})], ids=["one", "dp2", "pp2"])
def test_a_run_with_bad_images_is_the_run_without_their_samples(deep_stage2, tmp_path, num_processes, parallel):
    expected = settings(deep_stage2, tmp_path / "expected", 0)
    with_bad_images(expected, True)
    found = settings(deep_stage2, tmp_path / "found", BAD, **parallel)
    if num_processes == 1:
        with_bad_images(found, False)
    else:
        run_together(num_processes, with_bad_images, found, False)
    assert_same_run(found, expected)
    steps = read_metrics(found.run_dir)
    assert [step["num_bad_samples"] for step in steps] == [BAD, 0]
    same = ("num_samples", "num_targets")
    assert [[step[name] for name in same] for step in steps] == [
        [step[name] for name in same] for step in read_metrics(expected.run_dir)
    ]
    assert (found.run_dir / "bad-samples.jsonl").read_text().count("\n") == BAD


def test_a_bad_sample_that_a_batch_holds_twice_counts_twice_there_and_once_in_the_run(deep_stage2, tmp_path):
    values = deep_stage2.model_dump()
    values["data"]["shards"] = [source | {"repeat": 2} for source in values["data"]["shards"]]
    values["train"]["global_batch_size"] = 32
    mixture = RunConfig.model_validate(values)
    expected = settings(mixture, tmp_path / "expected", 0)
    with_bad_images(expected, True)
    found = settings(mixture, tmp_path / "found", BAD)
    with_bad_images(found, False)
    assert_same_run(found, expected)
    steps, without = read_metrics(found.run_dir), read_metrics(expected.run_dir)
    assert [step["num_bad_samples"] for step in steps] == [step["num_skipped"] for step in without] == [2 * BAD, 0]
    for name in ("num_samples", "num_targets"):
        assert [step[name] for step in steps] == [step[name] for step in without]
    assert (found.run_dir / FILE).read_text().count("\n") == BAD


def test_a_restart_remembers_what_the_run_has_met_on_every_rank(deep_stage2, tmp_path):
    """Two were met before the kill; the third, after it, is one too many, and no more when three are allowed."""
    expected = settings(deep_stage2, tmp_path / "expected", 0)
    with_bad_images(expected, True, 1)
    found = settings(deep_stage2, tmp_path / "found", BAD, tp=2)
    found = found.model_copy(update={"checkpoint": found.checkpoint.model_copy(update={"save_every_steps": 1})})
    with pytest.raises(RuntimeError, match="killed"):
        run_together(2, with_bad_images, found, False, 1, 1)
    with pytest.raises(RuntimeError) as caught:
        run_together(2, with_bad_images, found, False, 1)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("ValueError: step 2: ")]
    assert len(lines) == 2 and all(
        "with it the run has 3 bad samples, and data.max_bad_samples=2." in line for line in lines
    )
    run_together(2, with_bad_images, settings(found, found.run_dir, BAD + 1, tp=2), False, 1)
    assert [step["num_bad_samples"] for step in read_metrics(found.run_dir)] == [BAD, 1]
    assert (found.run_dir / FILE).read_text().count("\n") == BAD + 1
    assert_same_run(found, expected)


def initialized(function) -> str:
    """Returns what a function raises in a process of a run."""
    initialize_distributed()
    with pytest.raises((ValueError, OSError)) as caught:
        function()
    shutdown_distributed()
    return describe(caught.value)


def finds_its_disk_full(run_dir: Path) -> str:
    """Returns what a process says of a run whose first process can write nothing more."""

    def write() -> None:
        full = torch.distributed.get_rank() == 0
        with no_file_larger_than(10) if full else nullcontext():
            check_bad_samples({3: "bad", 5: "bad"}, 2, run_dir, 2, [5])

    return initialized(write)


def test_a_full_disk_ends_all_processes_and_leaves_the_file_whole(tmp_path):
    before = BadSample(step=1, sample=3, reason="bad").model_dump_json() + "\n"
    (tmp_path / FILE).write_text(before)
    said = run_together(2, finds_its_disk_full, tmp_path)
    assert said[0] == said[1] and said[0].startswith(f"{tmp_path / FILE}: File too large")
    assert [file.name for file in tmp_path.iterdir()] == [FILE] and (tmp_path / FILE).read_text() == before


def test_the_file_is_what_the_run_knows(megatron, tmp_path):
    """A killed run met 9 in a step that is taken again, and the end of its last line is missing."""
    lines = [
        BadSample(step=step, sample=n, reason=f"bad {n}").model_dump_json() for step, n in [(1, 3), (4, 9), (4, 8)]
    ]
    (tmp_path / FILE).write_text("\n".join(lines)[:-5])
    known = read_bad_samples(tmp_path, 2)
    assert known == {3: "bad 3"}
    check_bad_samples(known | {5: "bad 5"}, 2, tmp_path, 3, [5])
    assert read_bad_samples(tmp_path, 99) == {3: "bad 3", 5: "bad 5"} and read_bad_samples(tmp_path, 2) == known
    assert (tmp_path / FILE).read_text().count("\n") == 2


@pytest.mark.parametrize("line", ['{"step": 1, "sam{"step": 2, "sample": 3, "reason": "bad"}', '{"step": 1}', "[{}"])
def test_a_broken_line_is_one_line_that_names_the_file(tmp_path, line):
    (tmp_path / FILE).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path / FILE}: damaged \([^\n]*\); remove its broken lines"):
        read_bad_samples(tmp_path, 1)


def test_one_more_than_allowed_ends_the_run_on_every_rank(deep_stage2, tmp_path):
    config = settings(deep_stage2, tmp_path, BAD - 1)
    with pytest.raises(RuntimeError) as caught:
        run_together(2, with_bad_images, config, False)
    wrong = r"record .* does not decode: .*; with it the run has 2 bad samples, and data.max_bad_samples=1\. Mend them"
    assert len([line for line in str(caught.value).splitlines() if line.startswith("ValueError: step 1: ")]) == 2
    assert caught.match(wrong)
    with pytest.raises(ValueError, match=r"does not decode: .*; data.max_bad_samples=1 and more train on without"):
        with_bad_images(settings(deep_stage2, tmp_path / "none", 0), False)
    shutdown_distributed()
