"""The GPU report on a CPU, at tiny sizes: every part runs, and what is cut or crashes loses nothing else."""

import json
import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.fake_gpu.traces import ROOT, WAITS_OF_A_STEP
from benchmarks.gpu_report import parts, runner
from benchmarks.gpu_report.__main__ import DOCS, main
from benchmarks.gpu_report.outcomes import Outcomes
from benchmarks.gpu_report.runner import PARTS, Part, make_report
from benchmarks.gpu_report.tables import Result, markdown
from model.config import ComputeConfig
from model.transfer import read_values


def test_every_part_runs_without_a_gpu(tmp_path):
    chosen = [part for part in PARTS if part.arguments not in [("test_layers.py",), ("stage2", "fp8")]]  # as others do
    results = make_report(chosen, tmp_path, tmp_path, is_dry=True)
    assert [result.status for result in results] == ["done"] * len(chosen)
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    assert content["dry run"] and [part["what"] for part in content["parts"]] == [part.what for part in chosen]
    rows = {result.what: result.rows for result in results}
    exact, found = (rows[what] for what in rows if what.startswith("Losses"))
    assert [row["losses"] for row in found] == [row["losses"] for row in exact]
    assert all(row["near"] and len(set(row["losses"])) == 4 for row in found)
    step = {row["what"]: row for row in rows["A step of stage 2 in bf16, 7B widths"]}
    assert step["host waits of a step"]["value"] == step["host waits of a step"]["expected"] == 0
    assert step["forward_backward of the last step"]["value"] > 0
    assert all(row["passed"] > 0 and not row["failed"] for row in rows[chosen[1].what])
    assert (tmp_path / "gpu-report.md").read_text().startswith("# Dry run on a CPU: these numbers mean nothing\n")


def a_part(part: Part, folder, is_dry: bool) -> None:
    (folder / part.file).write_text('{"what": "found in time", "value": 1.5}\n')
    (folder / part.log).write_text(f"begins\nabout to {part.name}\n\n")
    if part.name == "late":
        time.sleep(60)
    if part.name == "crash":
        os.abort()


def test_what_is_cut_or_crashes_loses_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "enter_part", a_part)
    three = [Part("late", "Late", limit_seconds=3), Part("crash", "Crash"), Part("fine", "Fine")]
    results = make_report(three, tmp_path, tmp_path, is_dry=True)
    assert [result.status for result in results] == [
        "cut after 3 s; it last said: about to late",
        "failed: exit status -6; it last said: about to crash",
        "done",
    ]
    assert results[0].seconds < 30, "it was waited for"
    assert all(result.rows == [{"what": "found in time", "value": 1.5}] for result in results)
    monkeypatch.setattr(runner, "TOTAL_SECONDS", 0)
    assert make_report(three[2:], tmp_path, tmp_path, is_dry=True)[0].status == "left out: 0 s were over"


def test_rows_become_a_table_with_a_column_for_each_name():
    rows = [{"what": "step", "value": 123.4}, {"what": "a|b", "losses": [1.0, 0.25], "value": 0.5}]
    text = markdown({"dry run": False, "commit": "abc", "date": "today"}, [Result("Step", "done", 2.0, rows)])
    assert text.splitlines()[-4:] == [
        "| what | value | losses |",
        "| --- | --- | --- |",
        "| step | 123 |  |",
        "| a/b | 0.5 | 1, 0.25 |",
    ]


def test_a_test_is_a_row_with_its_first_failure():
    rows: list[dict] = []
    plugin = Outcomes(lambda **row: rows.append(row))
    for name, when, outcome in (
        ("a[1]", "setup", "passed"),
        ("a[1]", "call", "failed"),
        ("a[2]", "call", "failed"),
        ("a[3]", "call", "passed"),
        ("b", "setup", "skipped"),
    ):
        said = f"a traceback\nError in {name}"
        report = {"nodeid": f"t.py::{name}", "when": when, "outcome": outcome, "failed": outcome == "failed"}
        plugin.pytest_runtest_logreport(SimpleNamespace(**report, longrepr=said))
    plugin.pytest_sessionfinish()
    assert rows == [
        {"test": "a", "passed": 1, "failed": 2, "skipped": 0, "first_failure": "a[1]: Error in a[1]"},
        {"test": "b", "passed": 0, "failed": 0, "skipped": 1, "first_failure": ""},
    ]


@pytest.mark.parametrize(("loss", "is_near"), [(1.009, True), (0.991, True), (1.011, False), (float("nan"), False)])
def test_losses_that_are_far_from_the_cpus_fail_their_part(tmp_path, monkeypatch, loss, is_near):
    rows: list[dict] = []
    exact = [{"stage": stage, "losses": [2.0, 1.0]} for stage in ("stage1", "stage2")]
    (tmp_path / "losses-cpu.jsonl").write_text("\n".join(map(json.dumps, exact)))
    monkeypatch.setattr(gpu, "low_precisions", lambda: {"bf16": ComputeConfig(precision="bf16")})
    monkeypatch.setattr(parts, "_small_losses", lambda stage, compute: [2.0, loss])
    with nullcontext() if is_near else pytest.raises(SystemExit):
        parts.losses(parts.Work(tmp_path, False, lambda **row: rows.append(row)), "gpu")
    assert [row["near"] for row in rows] == [is_near] * 2 and rows[0]["allowed"] == 0.01


def test_a_step_of_which_torch_says_that_it_waits_elsewhere_is_seen(monkeypatch):
    """As torch warns: of the line in Python that asked."""

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        line = read_values.__code__.co_firstlineno + 2
        warnings.warn_explicit(f"{parts.WAIT} (x)", UserWarning, str(ROOT / "model/transfer.py"), line)

    for name, answer in (("is_available", True), ("synchronize", None), ("set_sync_debug_mode", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert parts.host_waits(step) == {**WAITS_OF_A_STEP, "tests/benchmarks/test_gpu_report.py, step": 1}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"dry_run": True}, "--dry-run measures nothing; give --out FOLDER"),
        ({"only": "step"}, "--only leaves parts out; give --out FOLDER"),
        ({"only": "nothing"}, "--only nothing is in no heading; there are: Machine; "),
        ({}, "gpu-report needs a CUDA GPU"),
    ],
)
def test_docs_get_the_whole_report_of_a_gpu_or_none(options, refusal, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    for out in (DOCS, Path("docs")):
        with pytest.raises(ValueError, match=refusal):
            main(out, **options)


def test_a_part_that_fails_says_why(tmp_path):
    part = Part("losses", "Losses", ("gpu",))  # without those of the CPU before
    [result] = make_report([part], tmp_path, tmp_path, is_dry=True)
    assert result.status.startswith("failed: exit status 1; it last said: FileNotFoundError: ")
