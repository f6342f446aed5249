"""How long `saisa` and `llava` read a prompt with an image, as exported models: the measurement of the paper's table 4.

    python -m benchmarks.latency                                                  a small model, on a CPU in two minutes
    python -m benchmarks.latency --hidden-size 4096 --layers 32 --device cuda     Vicuna-7B's sizes

A prompt has 64, 128 or 256 text tokens and one image; the model gives the logits of the next token and fills its cache.
The models have made-up weights and the widths of a file in configs/models, scaled, the encoder's with them. Beside them
stands LLaVA of transformers. All of them, and the encoder alone, take turns, forwards and backwards. A ratio is the
median of the rounds' ratios. On a CPU one thread works and its CPU time counts, which other jobs on the machine disturb
least; with more `--threads` time on the wall does. Source: arXiv 2502.02458, table 4.
"""

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
import yaml
from transformers import LlavaForConditionalGeneration

from benchmarks.gpu import MODELS, machine, time_together
from benchmarks.gpu_report.prefill import llava_config, made_up, prompt
from benchmarks.shards.measure import Figure, at_most, median_ratio, report
from common.console import UsageError, run
from model.config import ComputeConfig, ModelConfig
from model.flops import encoder_forward_flops, forward_flops
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf_sizes import hf_config

ARCHITECTURES = ("saisa", "llava")
THEIRS, ENCODER = "transformers' llava", "encoder"
GOAL, GOAL_TEXT, GOAL_HIDDEN_SIZE = 0.45, 64, 512  # of saisa / llava on a CPU


def scaled(model: ModelConfig, hidden_size: int, num_layers: int) -> ModelConfig:
    """Returns a model with widths and numbers of layers in proportion, the encoder's too; heads keep their size.

    Raises:
        UsageError: The width is no whole number of heads.
    """
    vision = model.vision
    num_heads, rest = divmod(hidden_size, model.head_dim)
    if rest or not num_heads:
        raise UsageError(f"--hidden-size {hidden_size} must be a multiple of {model.head_dim}, the size of a head")

    def part(width: int) -> int:
        return max(1, round(width * hidden_size / model.hidden_size))

    encoder = {
        "hidden_size": 64 * max(1, part(vision.hidden_size) // 64),
        "num_layers": max(3, round(vision.num_layers * num_layers / model.num_layers)),
    }
    groups = max(1, num_heads * model.num_query_groups // model.num_attention_heads)
    while num_heads % groups:
        groups -= 1
    changes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": part(model.ffn_hidden_size),
        "num_attention_heads": num_heads,
        "num_query_groups": groups,
        "vision": vision.model_dump() | encoder,
    }
    return ModelConfig.model_validate(model.model_dump() | changes)


@torch.no_grad()
def measure(
    model: ModelConfig, compute: ComputeConfig, num_prompts: int, num_text: int, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds of reading the prompts in each round: by each architecture, theirs, the encoder alone."""
    inputs = prompt(model, num_prompts, num_text, compute, device)
    models = {
        name: made_up(
            SaisaForConditionalGeneration, hf_config(model.model_copy(update={"architecture": name})), compute, device
        )
        for name in ARCHITECTURES
    }
    models[THEIRS] = made_up(LlavaForConditionalGeneration, llava_config(model), compute, device)
    passes: dict[str, Any] = {
        name: partial(built, **inputs, logits_to_keep=1, use_cache=True) for name, built in models.items()
    }
    tower: Any = models["saisa"]
    passes[ENCODER] = partial(tower.model.vision_tower, inputs["pixel_values"])
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time_together(passes, device, rounds, time.process_time if is_alone else time.perf_counter)


def figures_of(
    model: ModelConfig, seconds: dict[str, list[float]], num_prompts: int, num_text: int, on_cpu: bool
) -> list[Figure]:
    """Returns the medians and ratios of one size of prompt; the goal is for CPUs and one prompt."""
    what = f"{num_text} text tokens"
    figures = [Figure(f"{what}: {name}", median(times) * 1e3, "ms") for name, times in seconds.items()]
    alone = {
        name: [time - encoder for time, encoder in zip(seconds[name], seconds[ENCODER], strict=True)]
        for name in ARCHITECTURES
    }
    ratio = median_ratio(seconds["saisa"], seconds["llava"])
    has_goal = on_cpu and num_prompts == 1 and num_text == GOAL_TEXT and model.hidden_size >= GOAL_HIDDEN_SIZE
    whole = f"{what}: saisa / llava"
    figures += [
        at_most(whole, ratio, GOAL) if has_goal else Figure(whole, ratio),
        Figure(f"{what}: the same without the encoder", median_ratio(alone["saisa"], alone["llava"])),
        Figure(f"{what}: the same in FLOPs", flops_ratio(model, num_text)),
        Figure(f"{what}: saisa / {THEIRS}", median_ratio(seconds["saisa"], seconds[THEIRS])),
    ]
    return figures


def flops_ratio(model: ModelConfig, num_text: int) -> float:
    """Returns the FLOPs of `saisa` over those of `llava`, without the encoder's."""
    saisa, llava = (
        forward_flops(model.model_copy(update={"architecture": name}), num_text, model.num_tokens_per_image, 1)
        for name in ARCHITECTURES
    )
    return saisa / llava


def main(
    model: Annotated[str, typer.Option(help="a file of configs/models, for its proportions")] = "saisa-vicuna-7b",
    hidden_size: Annotated[int, typer.Option(help="width of the language model", min=1)] = 512,
    layers: Annotated[int, typer.Option(help="its layers", min=1)] = 8,
    prompts: Annotated[int, typer.Option(help="read at once", min=1)] = 1,
    text: Annotated[list[int] | None, typer.Option(help="text tokens of a prompt; may be repeated", min=6)] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where")] = "cpu",
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="default: fp32 on a CPU, bf16 on a GPU")
    ] = None,
    threads: Annotated[int, typer.Option(help="of torch on a CPU", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="timed rounds", min=1)] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the numbers here")] = None,
) -> None:
    """Measures how long saisa and llava read a prompt with an image."""
    if not (file := MODELS / f"{model}.yaml").is_file():
        raise UsageError(f"--model {model} must be one of {', '.join(sorted(path.stem for path in MODELS.glob('*')))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that torch can see, and there is none; use --device cpu")
    sizes = scaled(ModelConfig.model_validate(yaml.safe_load(file.read_text())), hidden_size, layers)
    torch.set_num_threads(threads)
    compute = ComputeConfig(precision=precision or ("fp32" if device == "cpu" else "bf16"))
    figures = []
    for num_text in text or [64, 128, 256]:
        seconds = measure(sizes, compute, prompts, num_text, torch.device(device), rounds)
        figures += figures_of(sizes, seconds, prompts, num_text, device == "cpu")
    encoder = encoder_forward_flops(sizes.vision, sizes.vision.usual_ffn_hidden_size)
    rest = forward_flops(sizes, 64, sizes.num_tokens_per_image, 1)
    figures.append(Figure("FLOPs: encoder / saisa without it, at 64 text tokens", encoder / rest))
    title = (
        f"prefill of {prompts} x (an image of {sizes.num_tokens_per_image} tokens, then text), {model} at width "
        f"{hidden_size}, {layers} layers, {compute.precision}, {device}, medians of {rounds}"
    )
    report(title, figures, json_file, machine() | {"threads": str(torch.get_num_threads())})


if __name__ == "__main__":
    run(main)
