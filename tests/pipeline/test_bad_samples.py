"""A sample whose image does not decode: as if it were not there, on one process or two; not one more than allowed."""

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.data import batches
from pipeline.data.batches import BatchSource
from pipeline.distributed import shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from tests.pipeline.test_parallel import assert_same_run
from tests.processes import run_together

BAD = 2  # of the samples of the first step that have an image, the first two


def with_bad_images(config: RunConfig, skip: bool) -> None:
    """Trains where two samples have a bad image, or (`skip`) where the table says of them that they have no text."""
    real = BatchSource.__init__

    def init(self, *args) -> None:
        real(self, *args)
        table = self.schedule.table
        numbers = [n for n in self.schedule.samples(0).tolist() if table.column("num_images")[n]][:BAD]
        if skip:
            table.values[numbers] = 0
            table.problems.update((number, "left out") for number in numbers)
        self.bad = numbers

    real_read = BatchSource._read

    def read(self, number):
        sample, stored = real_read(self, number)
        return sample, [image._replace(data=image.data[:60]) if number in self.bad else image for image in stored]

    patch = pytest.MonkeyPatch()
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


def test_one_more_than_allowed_ends_the_run_on_every_rank(deep_stage2, tmp_path):
    config = settings(deep_stage2, tmp_path, BAD - 1)
    with pytest.raises(RuntimeError) as caught:
        run_together(2, with_bad_images, config, False)
    wrong = r"record .* does not decode: .*; with it 2 samples are bad, and data.max_bad_samples=1\. Mend them"
    assert len([line for line in str(caught.value).splitlines() if line.startswith("ValueError: step 1: ")]) == 2
    assert caught.match(wrong)
    with pytest.raises(ValueError, match=r"does not decode: .*; data.max_bad_samples=1 and more train on without"):
        with_bad_images(settings(deep_stage2, tmp_path / "none", 0), False)
    shutdown_distributed()
