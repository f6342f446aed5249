"""The comparison: what it runs, that it goes on, and what it says of differences. No word about accuracy."""

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from common.console import UsageError
from model.flops import forward_flops, parameter_counts
from orchestration import compare_runs
from orchestration.compare import check_folder
from orchestration.compare_report import CLAIMS, Row, compared, spread, verdicts, write_report
from orchestration.compare_runs import VARIANTS, Size, compare, configs, finished, measured, named_variants
from pipeline.metrics import read_metrics

TINY = Size(12, 2, 2, ("train.max_steps=1",), ("train.max_steps=2",))


def row(name: str, *accuracies: float) -> Row:
    return Row(name, accuracies, 0.25, 1, training_flops=1, training_seconds=1, prefill_flops=1, prefill_seconds=1)


def test_a_difference_is_what_a_paired_t_test_calls_one():
    """By hand: differences of 10, 8 and 12 points have t = 0.10 / (0.02 / 3 ** 0.5) = 8.7 > 4.3; 10, 2 and 12, 2.6."""
    one = row("a", 0.90, 0.80, 0.70)
    assert compared(one, row("b", 0.80, 0.72, 0.58)) == "higher"
    assert compared(row("b", 0.80, 0.72, 0.58), one) == "lower"
    assert compared(one, row("b", 0.80, 0.78, 0.58)) == "not different"
    assert compared(row("a", 0.9), row("b", 0.1)) == "not different", "one seed says nothing"
    assert spread(row("a", 0.90, 0.92, 0.94)) == "92.0% ± 2.0%" and spread(row("a", 0.9)) == "90.0%"


def test_claims_are_judged_by_the_runs_that_are_there():
    rows = [row("llava", 0.8, 0.81), row("naavit", 0.7, 0.7101), row("saisa", 0.9, 0.9101)]
    found = {text.partition(" (")[0]: is_supported for text, is_supported, _ in verdicts(rows)}
    assert found == {
        "Attention among visual tokens is not needed": False,
        "SAISA is at least as accurate as LLaVA-1.5": True,
    }
    assert [is_supported for _, is_supported, _ in verdicts([row("llava", 0.8), row("naavit", 0.7)])] == [None]
    assert all("lower" not in claim.expected for claim in CLAIMS)


def test_every_variant_is_a_run_of_both_stages(tmp_path):
    for name in VARIANTS:
        first, second = configs(tmp_path, name, 3, TINY)
        assert (first.phase, second.phase) == ("pretrain", "finetune") and first.model == second.model
        assert second.init.projector == str(first.run_dir) and first.train.seed == second.train.seed == 3
    models = {name: configs(tmp_path, name, 0, TINY)[1].model for name in VARIANTS}
    assert len({model.model_dump_json() for model in models.values()}) == len(VARIANTS)
    assert named_variants("") == [*VARIANTS] and named_variants("saisa") == ["llava", "saisa"]
    with pytest.raises(UsageError, match="--only: 'lava' is unknown; use some of llava, naavit, saisa"):
        named_variants("saisa, lava")


def test_a_folder_is_new_or_holds_a_comparison_of_this_size(tmp_path):
    check_folder(tmp_path / "new", quick=True)
    check_folder(tmp_path / "new", quick=True)
    with pytest.raises(UsageError, match="holds another comparison than this whole one; use a new folder"):
        check_folder(tmp_path / "new", quick=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds files that no comparison wrote; use a new folder"):
        check_folder(tmp_path / "other", quick=False)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_comparison_goes_on_and_leaves_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_runs, "QUICK", TINY)
    monkeypatch.setattr(compare_runs, "NUM_TIMED", 1)
    compare(tmp_path, ["llava", "saisa"], 1, quick=True)
    first, second = configs(tmp_path, "saisa", 0, TINY)
    found = json.loads((tmp_path / "compare.json").read_text())
    (saisa,), (llava,) = found["saisa"]["runs"], found["llava"]["runs"]
    steps = [*read_metrics(first.run_dir), *read_metrics(second.run_dir)]
    assert saisa["training_flops"] == sum(step["training_flops"] for step in steps) < llava["training_flops"]
    assert saisa["num_added"] == parameter_counts(second.model, "finetune").projectors == 4 * llava["num_added"]
    assert saisa["prefill_flops"] == forward_flops(second.model, 64, 64, 1) < llava["prefill_flops"]
    (shortv,) = found["shortv"]["runs"]
    assert shortv["training_flops"] == llava["training_flops"]
    described = json.loads((tmp_path / "runs/shortv-0/export/config.json").read_text())
    assert described["architecture"] == "shortv" and described["frozen_layers"][-1] == 3, "the last gives nothing"
    assert saisa["prefill_flops"] < shortv["prefill_flops"] < llava["prefill_flops"]
    assert Image.open(tmp_path / "flops.png").width > 100 and "one seed says nothing" in capsys.readouterr().out
    page = (tmp_path / "compare.html").read_text()
    assert "it shows that everything runs" in page and page.count("<img") == 3

    def never(*_: object) -> None:
        raise AssertionError("a finished run is not trained again")

    monkeypatch.setattr(compare_runs, "train", never)
    assert finished(tmp_path, "saisa", 0, TINY).training_flops == saisa["training_flops"]
    assert measured([first, second], 0.5, 0.25).num_added == saisa["num_added"]


def test_the_page_tells_three_seeds(tmp_path: Path):
    run = {"blind_accuracy": 0.2, "num_added": 10, "training_flops": 5, "training_seconds": 2.0, "prefill_flops": 7}
    summary = {
        name: {"runs": [run | {"accuracy": value + seed / 100} for seed in range(3)], "prefill_seconds": 0.1}
        for name, value in (("llava", 0.5), ("saisa", 0.8))
    }
    write_report(summary, "llava", False, tmp_path, Console(quiet=True))
    page = (tmp_path / "compare.html").read_text()
    assert "81.0% ± 1.0%" in page and "saisa is higher" in page and "Its numbers say nothing" not in page
