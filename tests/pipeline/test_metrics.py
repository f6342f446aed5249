"""The metrics file survives an interruption: nothing twice, nothing torn."""

import json
import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from pipeline.config import LogConfig
from pipeline.data.batches import BatchCounts
from pipeline.metrics import MetricsLog, StepMetrics, check_log, read_metrics
from tests.full_disk import no_file_larger_than


def metrics(step: int, loss: float) -> StepMetrics:
    counts = BatchCounts(**dict.fromkeys(BatchCounts.__dataclass_fields__, 1))
    return StepMetrics(step, 0, loss, 1.0, 1e-3, 0.5, 0.1, counts, 3 * 10**12, 2, 1 << 30)


def test_a_resumed_run_replaces_what_lay_beyond_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 9.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    with MetricsLog(tmp_path, LogConfig(tensorboard=False), first_step=2, num_steps=4, is_first_rank=True) as log:
        log.step(metrics(3, 0.5))
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 9.0), (2, 9.0), (3, 0.5)]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: damaged .*; mend its lines or move it away"):
        MetricsLog(tmp_path, LogConfig(tensorboard=False), 2, 4, is_first_rank=True).__enter__()


def test_what_cannot_be_written_is_kept_until_it_can_be_told(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsLog(tmp_path, LogConfig(tensorboard=False), first_step=0, num_steps=2, is_first_rank=True) as log:
        log.check()
        for step in (1, 2):
            log.step(metrics(step, 0.5))
            assert log.failure is not None
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/metrics.jsonl'"):
        log.check()


def test_a_line_that_found_no_room_is_written_with_the_next(tmp_path):
    with MetricsLog(tmp_path, LogConfig(tensorboard=False), first_step=0, num_steps=3, is_first_rank=True) as log:
        log.step(metrics(1, 0.5))
        with no_file_larger_than((tmp_path / "metrics.jsonl").stat().st_size + 10):
            log.step(metrics(2, 0.5))
        assert log.failure is not None
        log.step(metrics(3, 0.5))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("num_steps", [1, 40])
def test_so_is_what_tensorboard_cannot_write_without_a_traceback_of_its_thread(tmp_path, monkeypatch, num_steps):
    """After the last step nobody asks the thread until it is closed."""
    printed: list = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    with ExitStack() as full, MetricsLog(tmp_path, LogConfig(), 0, num_steps=90, is_first_rank=True) as log:
        for step in range(1, 31):
            log.step(metrics(step, 0.5))
        assert log.tensorboard is not None
        log.tensorboard.flush()
        (events,) = (tmp_path / "tensorboard").iterdir()
        full.enter_context(no_file_larger_than(events.stat().st_size + 10))
        for step in range(31, 31 + num_steps):
            log.step(metrics(step, 0.5))
    with pytest.raises(OSError, match="File too large: '.*/tensorboard'"):
        log.check()
    assert not printed and threading.excepthook == printed.append


def test_plain_lines_tell_progress_where_there_is_no_terminal(tmp_path, capsys):
    with MetricsLog(tmp_path, LogConfig(every_steps=2), first_step=0, num_steps=3, is_first_rank=True) as log:
        for step in (1, 2, 3):
            log.step(metrics(step, 1 / step))
    told = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in told] == [["step 2/3", "loss 0.5000"], ["step 3/3", "loss 0.3333"]]
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_ranks_are_silent(tmp_path, capsys):
    with MetricsLog(tmp_path, LogConfig(), first_step=0, num_steps=1, is_first_rank=False) as log:
        log.step(metrics(1, 1.0))
        log.say("hello")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_rates_are_per_process_and_second():
    values = metrics(1, 1.0).values(peak_tflops=30.0)
    assert (values["tflops_per_second"], values["mfu"], values["padding_fraction"]) == (3.0, 0.1, 0.5)
    assert (values["samples_per_second"], values["peak_memory_bytes"]) == (2.0, 1 << 30)
    assert "mfu" not in metrics(1, 1.0).values()


def test_weights_and_biases_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_log(LogConfig())
    with pytest.raises(ValueError, match="log.wandb_project=x needs the package wandb"):
        check_log(LogConfig(wandb_project="x"))


def test_weights_and_biases_gets_every_step(tmp_path, monkeypatch):
    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values["loss"]))

        def finish(self):
            told.append("end")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: told.append(settings) or Run()))
    settings = LogConfig(wandb_project="x", tensorboard=False)
    (tmp_path / "run7").mkdir()
    with MetricsLog(tmp_path / "run7", settings, 0, 1, is_first_rank=True) as log:
        log.step(metrics(1, 0.25))
    assert told[0]["project"] == "x" and told[0]["id"] == (tmp_path / "run7/wandb-id").read_text()
    assert told[1:] == [(1, 0.25), "end"]
