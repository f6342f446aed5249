"""Kills in the middle of a run and of what it writes. Many more, at random moments: `make soak`."""

import pytest

from pipeline.checkpoint import writer as checkpoint_writer
from pipeline.config import RunConfig
from pipeline.distributed import shutdown_distributed
from pipeline.loop import train
from tests.soak.kill_training import being_written, check_checkpoints, check_same_run, kill_again_and_again, named


def with_saving(config: RunConfig, run_dir, **changes) -> RunConfig:
    return config.model_copy(update={"run_dir": run_dir, "checkpoint": config.checkpoint.model_copy(update=changes)})


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_goes_on_bit_for_bit(stage2, tmp_path):
    config = with_saving(stage2, tmp_path / "run", in_background=True)
    moments = (when(config.run_dir, step) for when, step in [(being_written, 2), (being_written, 2), (named, 2)])
    # A machine too busy to kill in time may let the run end before the last of them.
    assert len(list(kill_again_and_again(1, config, moments))) > 0
    check_same_run(config, stage2)


def test_a_kill_leaves_no_half_of_an_old_checkpoint_under_its_name(stage2, tmp_path, monkeypatch):
    config = with_saving(stage2, tmp_path / "run", keep_last=1)

    def removes_half(folder, ignore_errors=False):
        for file in folder.glob("*.distcp"):
            file.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_writer.shutil, "rmtree", removes_half)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    shutdown_distributed()
    monkeypatch.undo()
    assert check_checkpoints(config.run_dir) == 4
    train(config)
    assert [folder.name for folder in (config.run_dir / "checkpoints").iterdir()] == ["step-00000006"]
