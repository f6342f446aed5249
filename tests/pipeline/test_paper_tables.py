"""The table says of each of the paper's numbers which input gives it, and what our modules do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from model.config import model_config_from_hf
from model.flops import forward_flops
from model.hf_sizes import count_prefill_flops, hf_config
from model.paper_flops import PaperSizes, saisa_flops
from pipeline import flops_table
from pipeline.paper_tables import CLIP, CONVNEXT, SIGLIP, build_rows, explain, load_model
from tests.command_line import run_command

ARCHITECTURES = [
    {"architecture": "saisa"},
    {"architecture": "saisa", "block_size": 2},
    {"architecture": "llava"},
    {"architecture": "naavit"},
    {"architecture": "shortv", "frozen_layers": (1,)},
    {"projector": "resampler"},
]


def test_each_number_of_the_paper_is_explained():
    rows = {(row.model, row.architecture): row for row in build_rows()}
    explained = {key: row.explanation.partition(",")[0] for key, row in rows.items() if row.explanation}
    assert explained == {
        ("Mistral-7B, CLIP", "saisa"): "k = h = 4",
        ("Llama-3-8B, CLIP", "saisa"): "k = h = 4",
        ("Vicuna-7B, SigLIP", "saisa"): "d = 1",
        ("Vicuna-7B, ConvNeXt", "llava"): "d = 1",
        ("Vicuna-7B, ConvNeXt", "saisa"): "d = 1",
    }
    for row in rows.values():
        if row.published is not None:
            assert f"{(row.explained or row.formula) / 1e12:.2f}" == f"{row.published:.2f}"


def test_cross_attention_by_its_shapes_is_what_the_modules_do():
    """But that keys of our llama_3_2 come from a projector in front, of 4,096 numbers and not of 1,024."""
    rows = {row.architecture: row for row in build_rows()}
    head = 2 * 4096 * 32000
    assert rows["open_flamingo"].counted == rows["open_flamingo"].formula + head
    wider = 2 * 576 * (1024 * 4096 + 4096**2) + 8 * 2 * 576 * 2 * 4096 * (4096 - 1024)
    assert rows["llama_3_2"].counted == rows["llama_3_2"].formula + head + wider


def test_what_no_input_explains_is_said():
    sizes = PaperSizes.of(load_model("Mistral-7B", CLIP))
    assert explain(saisa_flops, sizes, 576, 2.05) == (None, "no one input gives the published number")
    assert explain(saisa_flops, replace(sizes, d=3072), 576, 2.10)[0] is None, "two inputs at once explain nothing"


def test_encoders_have_the_published_number_of_visual_tokens():
    tokens = [load_model("Vicuna-7B", encoder).vision.num_tokens for encoder in (CLIP, SIGLIP, CONVNEXT)]
    assert tokens == [576, 729, 1024]


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_torch_counts_the_same_in_the_hugging_face_model(settings):
    model = load_model("Mistral-7B", SIGLIP).model_copy(update={"num_layers": 3, **settings})
    assert model_config_from_hf(hf_config(model)) == model
    assert count_prefill_flops(model, 64) == forward_flops(model, 64, model.num_tokens_per_image, 1)


def test_the_command_writes_its_figure_and_its_numbers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("model.hf_sizes.count_prefill_flops", lambda model, num_text: 7)
    figure, numbers = tmp_path / "new" / "figure.png", tmp_path / "numbers.json"
    assert run_command(flops_table.main, "--figure", figure, "--json", numbers) == (0, "")
    with Image.open(figure) as drawn:
        assert drawn.size == (1440, 518)
    written = json.loads(numbers.read_text())
    assert [row["published"] for row in written["rows"][:2]] == [8.53, 2.86]
    curves = written["figure_4"]["visual"]
    assert curves["saisa"][curves["num_tokens"].index(576)] == written["rows"][1]["formula"]
    (tmp_path / "file").touch()
    status, said = run_command(flops_table.main, "--figure", tmp_path / "file" / "figure.png")
    assert status == 1 and said.startswith(f"error: {tmp_path / 'file'}")
