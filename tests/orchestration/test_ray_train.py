"""The Ray driver, on a Ray of its own: the same losses as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.console import UsageError
from orchestration.ray_train import main
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import resolve_paths
from pipeline.metrics import read_metrics
from tests.processes import wait_for_steps
from tests.world import CONFIGS


def workers(number: int, overrides: list[str], said: Path) -> subprocess.Popen[bytes]:
    """Starts the driver, on a Ray of its own."""
    driver = [sys.executable, "-m", "orchestration.ray_train", "--config", str(CONFIGS / "demo-stage1.yaml")]
    command = [*driver, "--num-workers", str(number), "--cpus-per-worker", "0.5", *overrides]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with said.open("w") as file:
        return subprocess.Popen(command, cwd=CONFIGS.parent, env=environment, stdout=file, stderr=file)


@pytest.mark.usefixtures("local_ray")
def test_a_ray_worker_gives_the_losses_of_a_process_without_ray(world, stage1, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # in which it looks whether the worker has ended
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more that imports for seconds
    overrides = world.overrides(tmp_path, **{"optim.learning_rate": stage1.optim.learning_rate})
    main(CONFIGS / "demo-stage1.yaml", overrides, cpus_per_worker=0.5)
    losses, expected = ([step["loss"] for step in read_metrics(run)] for run in (tmp_path, stage1.run_dir))
    assert losses == expected


@pytest.mark.slow
def test_two_ray_workers_give_the_losses_of_one_process(world, stage1, tmp_path):
    overrides = world.overrides(tmp_path, **{"optim.learning_rate": stage1.optim.learning_rate})
    run = workers(2, overrides, tmp_path / "said")
    assert run.wait() == 0, (tmp_path / "said").read_text()
    losses, expected = ([step["loss"] for step in read_metrics(run)] for run in (tmp_path, stage1.run_dir))
    assert losses == pytest.approx(expected, rel=5e-5)  # fp32 sums over two ranks in another order


@pytest.mark.slow
def test_a_file_stops_ray_workers_and_ray_does_not_start_them_again(world, tmp_path):
    endless = {"train.max_steps": 9000, "train.num_epochs": 9000, "checkpoint.save_every_steps": 9000}
    run = workers(2, world.overrides(tmp_path, **endless), tmp_path / "said")
    wait_for_steps(run, tmp_path, 1, tmp_path / "said")
    (tmp_path / "stop").touch()
    assert run.wait() == 143, (tmp_path / "said").read_text()
    assert find_checkpoint(tmp_path).name == f"step-{read_metrics(tmp_path)[-1]['step']:08d}"


def test_relative_paths_mean_the_root(world, stage1, tmp_path):
    config = world.config(
        "demo-stage2", tmp_path, init__base="bases/x", init__projector="runs/y", data__shards="/abs/z"
    )
    found = resolve_paths(config, tmp_path)
    assert found.init.base == tmp_path / "bases/x" and [source.location for source in found.data.shards] == ["/abs/z"]
    assert found.init.projector == str(tmp_path / "runs/y")
    url = world.config("demo-stage2", tmp_path, init__projector="base", data__shards="s3://bucket/z")
    assert [source.location for source in resolve_paths(url, tmp_path).data.shards] == ["s3://bucket/z"]
    assert resolve_paths(url, tmp_path).init.projector == "base"
    assert resolve_paths(stage1, tmp_path).init.projector == "random"


def test_a_wrong_configuration_stops_before_ray_starts():
    with pytest.raises(UsageError, match="did you mean 'train'"):
        main(CONFIGS / "demo-stage1.yaml", ["trian.seed=1"])
