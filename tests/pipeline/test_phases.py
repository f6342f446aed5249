"""Where the time of a step goes, which process is the slowest, what a run shows of itself on demand."""

import gc
import gzip
import json
import re
import time
from collections import Counter

import pytest
import torch

from model.parallel import ParallelConfig
from pipeline import step
from pipeline.config import RunConfig
from pipeline.distributed import gpu_environment
from pipeline.loop import train
from pipeline.metrics import read_metrics
from pipeline.phases import Phases, own_seconds, slowest
from pipeline.profiling import Profiler, check_profile_steps
from tests.full_disk import no_file_larger_than
from tests.processes import run_together


def test_parts_are_added_up_and_told_once(monkeypatch):
    ticks = iter([10.0, 11.0, 20.0, 20.5, 21.5, 24.0])
    monkeypatch.setattr("pipeline.phases.time.monotonic", lambda: next(ticks))
    phases = Phases()
    with phases("encode"):
        pass
    with phases("passes"):
        assert phases.around("reduce", lambda x: x + 1)(1) == 2
    phases.add("encode", 4.0)
    assert phases.read() == {"encode": 5.0, "reduce": 1.0, "passes": 4.0}
    assert phases.read() == {}


def test_on_a_gpu_events_are_recorded_and_their_milliseconds_become_seconds(monkeypatch):
    clock = iter([5.0, 1505.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(torch.device("cuda"))
    with phases("encode"):
        pass
    assert phases.read() == {"encode": 1.5}


def test_own_time_is_without_the_wait_for_others():
    assert own_seconds({"data": 1.0, "encode": 2.0, "forward_backward": 8.0, "reduce": 3.0, "optimizer": 9.0}) == 8.0
    assert slowest([1.0, 3.0, 2.0]) == (1, 0.5)
    assert slowest([0.0, 0.0]) == (0, 0.0)


def test_a_run_tells_the_time_of_each_part(stage1):
    first, *others = read_metrics(stage1.run_dir)
    for metrics in (first, *others):
        parts = [metrics[f"{name}_seconds"] for name in ("data", "encode", "forward_backward")]
        assert 0 < sum(parts) < metrics["step_seconds"]
        assert 0 < metrics["reduce_seconds"] < metrics["forward_backward_seconds"]
    assert "optimizer_seconds" not in first  # what comes behind the wait of a step is told with the next
    assert all(metrics["optimizer_seconds"] > 0 for metrics in others)


def test_garbage_is_collected_at_steps_alone_and_some_steps_are_recorded(world, tmp_path, monkeypatch):
    collected, enabled = [], []
    real_collect, real_step = gc.collect, step.forward_and_backward

    def forward_and_backward(*args):
        enabled.append(gc.isenabled())
        return real_step(*args)

    def collect(*args):
        collected.append(len(enabled))
        return real_collect(*args)

    monkeypatch.setattr(step, "forward_and_backward", forward_and_backward)
    monkeypatch.setattr(gc, "collect", collect)
    changes = {"train__max_steps": 4, "train__gc_every_steps": 2, "log__profile_steps": "[3,9]"}
    train(world.config("demo-stage1", tmp_path, **changes))
    assert enabled == [False] * 4 and gc.isenabled()
    assert {2, 4} <= set(collected) and not {1, 3} & set(collected)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name == "rank-0-steps-3-4.json.gz"
    saved = tmp_path / "checkpoints" / "step-00000004" / "info.json"
    assert file.stat().st_mtime_ns > saved.stat().st_mtime_ns, "whoever asks a run to stop may not wait so long"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = Counter(event.get("name") for event in events)
    assert names["encode"] == names["forward_backward"] == names["optimizer"] == 2 and names["aten::mm"] > 2


@pytest.mark.parametrize("steps", ["[3, 2]", "[0, 1]", "[20]", "[1, 2, 3]", "20", "[a, b]"])
def test_profile_steps_are_a_first_and_a_last(world, tmp_path, steps):
    with pytest.raises(ValueError, match=re.escape(f"log.profile_steps={steps} must be a first and a last step")):
        world.config("demo-stage1", tmp_path, log__profile_steps=steps)


def test_a_run_that_is_over_before_the_first_of_them_says_so():
    check_profile_steps(None, 6)
    check_profile_steps((6, 9), 6)
    with pytest.raises(ValueError, match=r"log.profile_steps=\[7, 9\] begins behind .* this run, 6; use \[5,6\]"):
        check_profile_steps((7, 9), 6)


def test_a_run_that_goes_on_in_their_midst_records_the_rest_of_them(tmp_path):
    profiler = Profiler(tmp_path, (3, 9), 1, on_gpu=False)
    profiler.before(5)
    profiler.after(5, is_last=False)
    assert profiler.write() == []
    profiler.before(6)
    profiler.after(6, is_last=True)
    assert profiler.write() == [tmp_path / "rank-1-steps-5-6.json.gz"]
    assert profiler.write() == []
    profiler.before(10)
    assert profiler.running is None


def test_a_full_disk_costs_a_run_its_profile_alone(tmp_path, capsys):
    profiler = Profiler(tmp_path, (1, 1), 1, on_gpu=False)
    profiler.before(1)
    profiler.after(1, is_last=False)
    with no_file_larger_than(500):
        assert profiler.write() == []
    assert "rank 1: no profile, training goes on: " in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def with_a_slow_process(config: RunConfig) -> None:
    encode = step.model_inputs

    def model_inputs(*args):
        time.sleep(1.0 * torch.distributed.get_rank())
        return encode(*args)

    step.model_inputs = model_inputs
    train(config)


def test_the_slowest_process_is_named(world, tmp_path):
    run_together(2, with_a_slow_process, world.config("demo-stage1", tmp_path, train__max_steps=3))
    last = read_metrics(tmp_path)[-1]  # tells of the step before, the second: the first of a process takes any time
    assert last["slowest_rank"] == 1 and last["slowest_fraction"] > 0


def test_a_users_environment_is_left_alone():
    segments = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert gpu_environment(ParallelConfig(), {}) == segments
    assert gpu_environment(ParallelConfig(tp=2), {}) == segments | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    own = {"PYTORCH_CUDA_ALLOC_CONF": "x", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert gpu_environment(ParallelConfig(tp=2), own) == {}
