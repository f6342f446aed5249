"""The latency benchmark times the models it names, of the sizes it says, and takes ratios round by round."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlavaForConditionalGeneration

from benchmarks import latency
from benchmarks.gpu import MODELS
from benchmarks.gpu_report.prefill import llava_config, made_up, prompt
from model.config import ComputeConfig, ModelConfig, model_config_from_hf
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf_sizes import hf_config
from tests.command_line import run_command

CPU, FP32 = torch.device("cpu"), ComputeConfig(precision="fp32")


def load(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))


def test_models_are_scaled_in_proportion():
    small = latency.scaled(load("saisa-vicuna-7b"), 512, 8)
    assert (small.hidden_size, small.ffn_hidden_size, small.num_layers) == (512, 1376, 8)
    assert (small.num_attention_heads, small.num_query_groups, small.head_dim) == (4, 4, 128)
    assert (small.vision.hidden_size, small.vision.num_layers, small.vision.num_tokens) == (128, 6, 576)
    grouped = latency.scaled(load("saisa-mistral-7b"), 1024, 8)
    assert (grouped.num_attention_heads, grouped.num_query_groups) == (8, 2)
    assert latency.scaled(load("saisa-vicuna-7b"), 4096, 32) == load("saisa-vicuna-7b")


def test_the_models_have_the_sizes_and_read_the_prompt():
    model = latency.scaled(load("saisa-tiny"), 64, 2)
    inputs = prompt(model, 2, 9, FP32, CPU)
    assert inputs["input_ids"].shape == (2, 9 + 64)
    for architecture in latency.ARCHITECTURES:
        sized = model.model_copy(update={"architecture": architecture})
        config = hf_config(sized)
        assert model_config_from_hf(config) == sized
        made_up(SaisaForConditionalGeneration, config, FP32, CPU)(**inputs)
    theirs = made_up(LlavaForConditionalGeneration, llava_config(model), FP32, CPU)
    ours = made_up(SaisaForConditionalGeneration, hf_config(sized), FP32, CPU)  # the llava
    names = "language_model", "multi_modal_projector", "lm_head"
    count = sum(p.numel() for name, p in theirs.named_parameters() if any(part in name for part in names))
    assert count == sum(p.numel() for name, p in ours.named_parameters() if "vision_tower" not in name)
    assert theirs(**inputs).logits.shape == (2, 9 + 64, model.vocab_size)


def test_ratios_are_taken_round_by_round_and_the_goal_is_for_a_cpu():
    seconds = {
        "saisa": [2.0, 4.0, 30.0],
        "llava": [4.0, 10.0, 50.0],
        latency.THEIRS: [8.0, 8.0, 60.0],
        latency.ENCODER: [1.0, 2.0, 10.0],
    }
    model = latency.scaled(load("saisa-vicuna-7b"), 512, 8)
    found = {figure.what: figure for figure in latency.figures_of(model, seconds, 1, 64, on_cpu=True)}
    values = {what.removeprefix("64 text tokens: "): figure.value for what, figure in found.items()}
    assert values["saisa"] == 4000 and values["encoder"] == 2000
    assert values["saisa / llava"] == pytest.approx(0.5)  # of 0.5, 0.4 and 0.6
    assert values["the same without the encoder"] == pytest.approx(1 / 3)  # of 1/3, 1/4 and 1/2
    assert values[f"saisa / {latency.THEIRS}"] == pytest.approx(0.5)  # of 1/4, 1/2 and 1/2
    assert found["64 text tokens: saisa / llava"].met is False
    for prompts, text, on_cpu in ((1, 128, True), (1, 64, False), (8, 64, True)):
        figures = latency.figures_of(model, seconds, prompts, text, on_cpu)
        assert all(figure.met is None for figure in figures)


def test_the_command_measures_and_writes(tmp_path: Path):
    numbers, threads = tmp_path / "numbers.json", torch.get_num_threads()
    options = ("--model", "saisa-tiny", "--hidden-size", 64, "--layers", 2, "--rounds", 1, "--text", 8)
    try:
        assert run_command(latency.main, *options, "--json", numbers)[0] == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(numbers.read_text())["figures"]
    assert len(figures) == 9 and all(figure["value"] > 0 for figure in figures)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--model", "none"), "--model none must be one of saisa-llama3-8b, "),
        (("--hidden-size", 100), "--hidden-size 100 must be a multiple of 128, the size of a head"),
        (("--device", "cuda"), "--device cuda needs a GPU that torch can see"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(options, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = run_command(latency.main, *options)
    assert status == 2 and line in said and said.count("\n") == 1
