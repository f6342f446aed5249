"""The Ray driver, on a Ray of its own: the same losses as one process."""

import os
import subprocess
import sys

import pytest

from data_prep.console import UsageError
from orchestration.ray_train import main
from pipeline.config import resolve_paths
from pipeline.metrics import read_metrics
from tests.world import CONFIGS


@pytest.mark.slow
def test_two_ray_workers_give_the_losses_of_one_process(world, stage1, tmp_path):
    overrides = world.overrides(tmp_path, **{"optim.learning_rate": stage1.optim.learning_rate})
    driver = [sys.executable, "-m", "orchestration.ray_train", "--config", str(CONFIGS / "demo-stage1.yaml")]
    command = [*driver, "--num-workers", "2", "--cpus-per-worker", "0.5", *overrides]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    losses, expected = ([step["loss"] for step in read_metrics(run)] for run in (tmp_path, stage1.run_dir))
    assert losses == pytest.approx(expected, rel=5e-5)  # fp32 sums over two ranks in another order


def test_relative_paths_mean_the_root(world, stage1, tmp_path):
    config = world.config(
        "demo-stage2", tmp_path, init__base="bases/x", init__projector="runs/y", data__shards="/abs/z"
    )
    found = resolve_paths(config, tmp_path)
    assert found.init.base == tmp_path / "bases/x" and [source.place for source in found.data.shards] == ["/abs/z"]
    assert found.init.projector == str(tmp_path / "runs/y")
    assert resolve_paths(stage1, tmp_path).init.projector == "random"


def test_a_wrong_configuration_stops_before_ray_starts():
    with pytest.raises(UsageError, match="did you mean 'train'"):
        main(CONFIGS / "demo-stage1.yaml", ["trian.seed=1"])
