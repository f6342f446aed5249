"""The metrics file survives an interruption: nothing twice, nothing torn."""

import json
import sys
from types import SimpleNamespace

import pytest

from pipeline.config import LogConfig
from pipeline.data.batches import BatchCounts
from pipeline.metrics import MetricsLog, StepMetrics, check_log, read_metrics


def metrics(step: int, loss: float) -> StepMetrics:
    counts = BatchCounts(**dict.fromkeys(BatchCounts.__dataclass_fields__, 1))
    return StepMetrics(step, 0, loss, 1.0, 1e-3, 0.5, 0.1, counts, 3 * 10**12, 2, 1 << 30)


def test_a_resumed_run_replaces_what_lay_beyond_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 9.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    with MetricsLog(tmp_path, LogConfig(tensorboard=False), first_step=2, num_steps=4, is_first_rank=True) as log:
        log.step(metrics(3, 0.5))
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 9.0), (2, 9.0), (3, 0.5)]


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
