"""The GPU report on a CPU, at tiny sizes: every part runs, and what is cut or crashes loses nothing else."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu_report import runner
from benchmarks.gpu_report.__main__ import DOCS, main
from benchmarks.gpu_report.runner import PARTS, Part, make_report
from benchmarks.gpu_report.tables import Result, markdown


def test_every_part_runs_without_a_gpu(tmp_path):
    parts = [part for part in PARTS if part.arguments not in [("test_layers.py",), ("stage2", "fp8")]]  # as others do
    results = make_report(parts, tmp_path, tmp_path, is_dry=True)
    assert [result.status for result in results] == ["done"] * len(parts)
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    assert content["dry run"] and [part["what"] for part in content["parts"]] == [part.what for part in parts]
    rows = {result.what: result.rows for result in results}
    exact, found = (rows[what] for what in rows if what.startswith("Losses"))
    assert [row["losses"] for row in found] == [row["losses"] for row in exact]
    assert all(row["near"] and len(set(row["losses"])) == 4 for row in found)
    step = {row["what"]: row for row in rows["A step of stage 2 in bf16, 7B widths"]}
    assert step["host waits of a step"]["value"] == step["host waits of a step"]["expected"] == 0
    assert step["forward_backward of the last step"]["value"] > 0
    assert all(row["passed"] > 0 and not row["failed"] for row in rows[parts[1].what])
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
    parts = [Part("late", "Late", limit_seconds=3), Part("crash", "Crash"), Part("fine", "Fine")]
    results = make_report(parts, tmp_path, tmp_path, is_dry=True)
    assert [result.status for result in results] == [
        "cut after 3 s; it last said: about to late",
        "failed: exit status -6; it last said: about to crash",
        "done",
    ]
    assert all(result.rows == [{"what": "found in time", "value": 1.5}] for result in results)
    monkeypatch.setattr(runner, "TOTAL_SECONDS", 0)
    assert make_report(parts[2:], tmp_path, tmp_path, is_dry=True)[0].status == "left out: 0 s were over"


def test_rows_become_a_table_with_a_column_for_each_name():
    rows = [{"what": "step", "value": 123.4}, {"what": "a|b", "losses": [1.0, 0.25], "value": 0.5}]
    text = markdown({"dry run": False, "commit": "abc", "date": "today"}, [Result("Step", "done", 2.0, rows)])
    assert text.splitlines()[-4:] == [
        "| what | value | losses |",
        "| --- | --- | --- |",
        "| step | 123 |  |",
        "| a/b | 0.5 | 1, 0.25 |",
    ]


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
