"""What freezing visual tokens in one layer changes, against the equations in fp64; and what follows from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from model.hf_check import check_export
from model.hf_export import load_model
from pipeline import layer_contribution
from pipeline.config import load_config
from pipeline.evaluation.contribution import divergence, frozen, layer_contributions
from pipeline.evaluation.questions import Question
from pipeline.evaluation.ranking import Contributions, Direction, shortv_yaml, shuffled_questions, usual_num_frozen
from tests.command_line import run_command
from tests.hf_compat.make_folder import make_export
from tests.hf_compat.tiny import SIZES
from tests.model.hf_models import NUM_IMAGES, ROWS, all_pixels, batch, build, own_pixels, reference
from tests.source_files import ROOT

NUM_LAYERS = SIZES["num_hidden_layers"]
LAST = NUM_LAYERS - 1
SEEING = [number for number, count in enumerate(NUM_IMAGES) if count]
DIRECTIONS: tuple[Direction, ...] = ("frozen-original", "original-frozen")


def rules(frozen_layer: int | None = None) -> list[tuple[str, str]]:
    return [("below", "nothing" if layer == frozen_layer else "all") for layer in range(NUM_LAYERS)]


def all_inputs() -> dict[str, Tensor]:
    return batch([ROWS[number] for number in SEEING]) | {"pixel_values": all_pixels()}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contributions_are_those_of_the_equations(direction):
    model, expected = build(architecture="llava"), []
    for number in SEEING:
        original, *others = (
            reference(model, ROWS[number], own_pixels(number), rules=rules(layer))[-1].softmax(-1)
            for layer in (None, *range(NUM_LAYERS))
        )
        pairs = [(other, original) if direction == "frozen-original" else (original, other) for other in others]
        expected.append([float((p * (p / q).log()).sum()) for p, q in pairs])
    found = layer_contributions(model, all_inputs(), direction)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-6)
    assert min(min(row[:LAST]) for row in expected) > 1e-3, "each layer but the last changes something"
    assert max(abs(row[LAST]) for row in expected) < 1e-12, "the reference leaves nothing out, so it rounds otherwise"


def test_the_last_layers_contribution_is_exactly_zero_and_freezing_it_changes_no_logit():
    model, inputs = build(architecture="llava"), all_inputs()
    assert layer_contributions(model, inputs, "frozen-original")[:, LAST].tolist() == [0.0] * len(SEEING)
    with torch.no_grad():
        before = model(**inputs).logits
        with frozen(model, [LAST]):
            assert torch.equal(model(**inputs).logits, before)


def test_a_frozen_model_is_the_shortv_of_its_weights_until_it_is_itself_again():
    model, inputs = build(architecture="llava"), all_inputs()
    shortv = build(architecture="shortv", frozen_layers=[0, 1])
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before, wanted = model(**inputs).logits, shortv(**inputs).logits
        with frozen(model, [1, 0]):
            assert torch.equal(model(**inputs).logits, wanted)
            assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
        assert torch.equal(model(**inputs).logits, before) and not torch.equal(before, wanted)


def test_the_direction_is_the_one_that_is_named():
    original, other = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.5, 0.25))
    by_hand = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()  # of 0.25 and 0.75 to 0.5 and 0.5
    assert divergence(original, other, "frozen-original").item() == pytest.approx(by_hand.item(), rel=1e-6)
    by_hand = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert divergence(original, other, "original-frozen").item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_least_contributing_layers_are_frozen(tmp_path):
    result = Contributions([[3.0, 0.5, 1.0, 0.0], [1.0, 0.5, 1.0, 0.0]], "frozen-original", num_frozen=2)
    assert result.means == [2.0, 0.5, 1.0, 0.0] and result.standard_errors == [1.0, 0.0, 0.0, 0.0]
    assert result.ranking == [3, 1, 2, 0] and result.frozen_layers == [1, 3]
    assert [usual_num_frozen(n) for n in (32, 40, 1)] == [19, 24, 1], "as the authors of ShortV have it, for 7B and 13B"
    text = shortv_yaml(result, "exports/llava")
    assert yaml.safe_load(text) == {"model": {"architecture": "shortv", "frozen_layers": [1, 3]}}
    overrides = next(line for line in text.splitlines() if "ARGS" in line).split('"')[1].split()
    assert load_config(ROOT / "configs" / "demo-stage1.yaml", overrides).model.frozen_layers == (1, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A random `llava`, and five questions, one of which is about no picture."""
    folder = tmp_path_factory.mktemp("contribution")
    make_export(folder / "work", folder / "model", "llama", "clip", "mlp", architecture="llava")
    rows: list[dict[str, Any]] = []
    for number in range(5):
        noise = torch.randint(0, 256, (30, 30, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        said = [{"from": "human", "value": f"<image>\nIs it {number}?"}, {"from": "gpt", "value": "no"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    rows[1].pop("image")
    rows[1]["conversations"][0]["value"] = "Is it?"
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def run(world: Path, *more: object, model: str = "model") -> tuple[int, str]:
    options = ("--model", world / model, "--data", world / "test.json", "--images", world)
    return run_command(layer_contribution.main, *options, *more)


def test_the_command_writes_the_ranking_a_plot_and_settings_that_a_seed_decides(world, tmp_path):
    check_export(world / "model")
    found = {}
    for name, options in {
        "one": ("--batch-size", 1),
        "again": ("--batch-size", 3),
        "seed": ("--seed", 1),
        "other": ("--direction", "original-frozen", "--num-frozen", 1),
    }.items():
        assert run(world, "--out", tmp_path / name, "--samples", 3, *options)[0] == 0
        found[name] = json.loads((tmp_path / name / "contribution.json").read_text())
        with Image.open(tmp_path / name / "contribution.png") as plot:
            assert plot.size == (1152, 518)
    settings = yaml.safe_load((tmp_path / "one" / "shortv.yaml").read_text())["model"]
    one, again, other = (found[name] for name in ("one", "again", "other"))
    assert (
        settings == {"architecture": "shortv", "frozen_layers": one["frozen_layers"]} and len(one["frozen_layers"]) == 2
    )
    assert one["contributions"] == pytest.approx(again["contributions"], rel=1e-3), "batches change nothing"
    assert one["contributions"] != pytest.approx(found["seed"]["contributions"], rel=1e-3)
    assert one["contributions"] != pytest.approx(other["contributions"], rel=1e-3) and len(other["frozen_layers"]) == 1
    assert one["contributions"][LAST] == 0 and one["ranking"][0] == LAST and one["num_samples"] == 3


def test_an_export_whose_config_says_shortv_is_the_frozen_model(world, tmp_path):
    """As the README has it: without training, and without writing weights."""
    shutil.copytree(world / "model", tmp_path / "shortv")
    file = tmp_path / "shortv" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": "shortv", "frozen_layers": [1]}))
    model, shortv = (load_model(folder).eval() for folder in (world / "model", tmp_path / "shortv"))
    inputs = all_inputs()
    with torch.no_grad(), frozen(model, [1]):
        assert torch.equal(model(**inputs).logits, shortv(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (("--samples", 5), 1, "test.json has 4 questions with an image, and --samples 5 wants more; give more rows"),
        (("--rows", "1:2"), 1, "test.json has 0 questions with an image"),
        (("--num-frozen", 4), 2, "--num-frozen 4 is more than the 3 layers of "),
        (("--images", "nowhere"), 1, "nowhere"),
        (("--direction", "both"), 2, ""),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(world, tmp_path, options, status, line):
    code, said = run(world, "--out", tmp_path / "out", "--samples", 1, *options)
    assert code == status and line in said and not (tmp_path / "out").exists()


def test_other_architectures_and_folders_that_cannot_be_written_are_refused(world, tmp_path):
    make_export(world / "work2", world / "saisa", "llama", "clip", "mlp")
    code, said = run(world, "--out", tmp_path, "--samples", 1, model="saisa")
    assert code == 1 and "config.json: architecture='saisa', but contributions are of a llava" in said
    code, said = run(world, "--out", world / "0.png" / "out", "--samples", 1)
    assert code == 1 and said.startswith(f"error: {world / '0.png'}") and said.count("\n") == 1


def test_questions_that_do_not_fit_are_passed_over(world, tmp_path):
    rows = json.loads((world / "test.json").read_text())
    for row in rows[2:]:
        row["conversations"][0]["value"] += " word" * 300
    (world / "long.json").write_text(json.dumps(rows))
    out = ("--out", tmp_path / "out", "--data", world / "long.json")
    assert run(world, *out, "--samples", 1)[0] == 0
    assert 0 <= json.loads((tmp_path / "out" / "contribution.json").read_text())["num_too_long"] <= 3
    code, said = run(world, *out, "--samples", 2)
    assert code == 1 and "1 question of 4 fit its 256 positions, and --samples 2 wants more" in said


def test_a_seed_decides_the_order_of_all_questions_with_a_picture():
    questions = [Question(str(n), "", ("a.png",) if n % 2 else (), "?", "") for n in range(40)]
    orders = [[q.row_id for q in shuffled_questions(questions, 5, seed, "x")] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(int, orders[0])) == sorted(map(int, orders[2])) == list(range(1, 40, 2))
