"""What SAISA's layers cost on one GPU, at the widths of a 7B model: ratios within one run.

    make bench-gpu ARGS="--json numbers.json"

- A layer, forward and backward, against LLaVA's, whose visual tokens ask, attend and pass the FFN like any other token.
  It has no projector.
- Attention with each kernel against dense masks.
- FP8 against bf16, and Transformer Engine's RMSNorm against torch's, which the model uses.
- Forward and backward passes of a model with few layers, as a fraction of the chip's bf16 peak (MFU), in both stages;
  without encoder, optimizer and communication.

A pass is timed from launch to the end of its last kernel. The passes that are compared take turns.
"""

import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import torch
import typer
import yaml
from megatron.core.models.backends import get_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from benchmarks.shards.measure import Figure, median_ratio, report
from common.console import run
from model.attention import attention, check_backend, installed_kernels, rotary_table
from model.backend import HAVE_TE, LayerBuilder, check_fp8
from model.compute import build_transformer_config, compute_dtype
from model.config import ComputeConfig, ModelConfig
from model.flops import Phase, layer_training_flops, matrix_products, projector_training_flops, training_flops
from model.pack import Pack
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from model.updates import build_layer
from pipeline.config import LogConfig
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.metrics import peak_tflops
from pipeline.optimizer import freeze

Pass = Callable[[], None]
MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn")
WARM_UP = 3  # rounds that are not timed: kernels are chosen or compiled, delayed FP8 scales settle


def even_pack(num_samples: int, num_text: int, num_images: int, num_tokens: int) -> Pack:
    """Returns a pack of equal samples whose images divide their text evenly; every text token has a target."""
    before = [(j + 1) * num_text // (num_images + 1) for j in range(num_images)]  # text tokens before each image
    starts = torch.tensor([text + j * num_tokens for j, text in enumerate(before)], dtype=torch.long)
    positions = torch.arange(num_text + num_images * num_tokens)
    is_visual = ((positions[:, None] >= starts) & (positions[:, None] < starts + num_tokens)).any(-1)
    return Pack(
        token_ids_T=torch.zeros(num_samples * num_text, dtype=torch.long),
        positions_T=positions[~is_visual].repeat(num_samples),
        targets_T=torch.zeros(num_samples * num_text, dtype=torch.long),
        image_positions=starts.repeat(num_samples),
        text_lengths=[num_text] * num_samples,
        image_counts=[num_images] * num_samples,
        num_tokens_per_image=num_tokens,
    )


def time_together(
    passes: Mapping[str, Pass], device: torch.device, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the seconds of each pass in each round; their order turns around with every round."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(WARM_UP + rounds):
        for name in list(passes)[:: -1 if number % 2 else 1]:
            finish()
            started = clock()
            passes[name]()
            finish()
            seconds[name].append(clock() - started)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def random_weights[M: torch.nn.Module](module: M, device: torch.device) -> M:
    """Returns the module on the device, with weights of a size that keeps numbers in range."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return module.to(device)


def layer_pass(model: ModelConfig, compute: ComputeConfig, pack: Pack, device: torch.device) -> Pass:
    """Returns a forward and backward pass of one layer in the middle of a model, with all its weights trained."""
    middle = model.num_layers // 2
    is_projected = model.layers[middle].is_projected
    config = build_transformer_config(model, compute, ParallelConfig(), shared_projector=not is_projected)
    layers = LayerBuilder(config, ProcessGroupCollection.use_mpu_process_groups().tp)
    layer = random_weights(build_layer(layers, model, middle, is_projected, compute.attention), device)
    text_TD = torch.randn(
        len(pack.positions_T), model.hidden_size, device=device, dtype=compute_dtype(compute), requires_grad=True
    )
    width = model.vision.hidden_size if is_projected else model.hidden_size
    visual = torch.randn(
        len(pack.visual_positions_I), width, device=device, dtype=compute_dtype(compute), requires_grad=not is_projected
    )
    num_out = len(pack.positions_T) + (len(visual) if model.layers[middle].update != "none" else 0)
    placed = pack.to(device)
    gradient = torch.randn(num_out, model.hidden_size, device=device, dtype=compute_dtype(compute))
    rotary = rotary_table(
        placed.key_positions_S, model.head_dim, model.rope_theta, compute_dtype(compute), config.apply_rope_fusion
    )

    def once() -> None:
        layer.zero_grad(set_to_none=True)
        layer.set_is_first_microbatch()  # FP8 weights are made anew
        with layers.fp8_of_all(), layers.fp8_of_layer(middle):
            out = layer(text_TD, visual, placed, rotary)
        out.backward(gradient)
        text_TD.grad = visual.grad = None

    return once


def pass_flops(model: ModelConfig, pack: Pack) -> int:
    """Returns the FLOPs of `layer_pass`, full rectangles of attention as in `model.flops`."""
    kind = model.layers[model.num_layers // 2]
    p = matrix_products(model, pack.text_lengths[0], pack.visual_lengths[0], 0, kind.update)
    projector = projector_training_flops(p) if kind.is_projected else 0
    return len(pack.text_lengths) * (layer_training_flops(p, num_passes=3) + projector)


def compare_with_llava(
    model: ModelConfig, compute: ComputeConfig, sizes: tuple[int, int, int], device: torch.device, rounds: int
) -> list[Figure]:
    """Returns what a layer costs as SAISA and as LLaVA, for `sizes` samples, text tokens and images of each."""
    pack = even_pack(*sizes, model.num_tokens_per_image)
    models = {name: model.model_copy(update={"architecture": name}) for name in ("saisa", "llava")}
    seconds = time_together(
        {name: layer_pass(model, compute, pack, device) for name, model in models.items()}, device, rounds
    )
    flops = {name: pass_flops(model, pack) for name, model in models.items()}
    shape = f"{sizes[0]} samples of {sizes[1]} text tokens and {sizes[2]} images"
    figures = [
        Figure(f"layer, llava / saisa: time, {shape}", median_ratio(seconds["llava"], seconds["saisa"])),
        Figure(f"layer, llava / saisa: FLOPs, {shape}", flops["llava"] / flops["saisa"]),
    ]
    for name, times in seconds.items():
        figures.append(Figure(f"layer, {name}: rate, {shape}", flops[name] / median(times) / 1e12, "TFLOP/s"))
    return figures


def attention_pass(
    model: ModelConfig, dtype: torch.dtype, pack: Pack, kernel: str, device: torch.device, needs_grad: bool = True
) -> Pass:
    """Returns a forward and backward pass of one layer's attention; forward alone without `needs_grad`."""
    num_text, num_keys, size = len(pack.positions_T), len(pack.key_positions_S), model.head_dim
    shapes = [(num_text, model.num_attention_heads, size)] + 2 * [(num_keys, model.num_query_groups, size)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=needs_grad) for shape in shapes)
    placed, gradient = pack.to(device), torch.randn_like(q)

    def once() -> None:
        out_TNH = attention(q, k, v, placed, kernel)
        if needs_grad:
            torch.autograd.grad(out_TNH, (q, k, v), gradient)

    return once


def compare_kernels(
    model: ModelConfig, dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device, rounds: int
) -> list[Figure]:
    """Returns how much faster than dense masks each kernel is that can run here."""
    pack = even_pack(*sizes, model.num_tokens_per_image)
    kernels = []
    for kernel in sorted(installed_kernels()):
        try:
            check_backend(kernel, device.type, dtype, model.head_dim, installed_kernels())
        except ValueError as error:
            print(f"left out: {error}")
        else:
            kernels.append(kernel)
    passes = {kernel: attention_pass(model, dtype, pack, kernel, device) for kernel in kernels}
    seconds = time_together(passes, device, rounds)
    shape = f"{sizes[0]} samples of {sizes[1]} text tokens and {sizes[2]} images"
    return [
        Figure(f"attention, dense / {kernel}: time, {shape}", median_ratio(seconds["dense"], times))
        for kernel, times in seconds.items()
        if kernel != "dense"
    ]


def low_precisions() -> dict[str, ComputeConfig]:
    """Returns bf16, and FP8 with every recipe that can run here; prints why others cannot."""
    found = {"bf16": ComputeConfig(precision="bf16")}
    for recipe in RECIPES:
        try:
            check_fp8(recipe)
        except ValueError as error:
            print(f"left out: {error}")
        else:
            found[f"fp8 {recipe}"] = ComputeConfig(precision="fp8", fp8_recipe=recipe)
    return found


def compare_precisions(
    model: ModelConfig, sizes: tuple[int, int, int], device: torch.device, rounds: int
) -> list[Figure]:
    """Returns how much faster than in bf16 a SAISA layer is in FP8, with every recipe that can run here."""
    computes = low_precisions()
    pack = even_pack(*sizes, model.num_tokens_per_image)
    passes = {name: layer_pass(model, compute, pack, device) for name, compute in computes.items()}
    seconds = time_together(passes, device, rounds)
    return [
        Figure(f"layer, bf16 / {name}: time", median_ratio(seconds["bf16"], times))
        for name, times in seconds.items()
        if name != "bf16"
    ]


def compare_norms(model: ModelConfig, num_rows: int, device: torch.device, rounds: int) -> list[Figure]:
    """Returns how Transformer Engine's RMSNorm compares with torch's, forward and backward; nothing without it."""
    if not (HAVE_TE and device.type == "cuda"):
        return []
    compute = ComputeConfig(precision="bf16")
    config = build_transformer_config(model, compute, ParallelConfig(), False)
    ours = LayerBuilder(config, ProcessGroupCollection.use_mpu_process_groups().tp).rms_norm().to(device)
    builder = cast(Any, get_backend("transformer_engine").layer_norm(rms_norm=True))
    norms = {"torch": ours, "transformer engine": builder(config, model.hidden_size, eps=model.norm_epsilon)}
    x = torch.randn(num_rows, model.hidden_size, device=device, dtype=compute_dtype(compute), requires_grad=True)
    gradient = torch.randn_like(x)

    def pass_of(norm: Callable[[Tensor], Tensor], weight: Tensor) -> Pass:
        return lambda: (torch.autograd.grad(norm(x), (x, weight), gradient), None)[1]

    seconds = time_together({name: pass_of(norm, norm.weight) for name, norm in norms.items()}, device, rounds)
    ratio = median_ratio(seconds["transformer engine"], seconds["torch"])
    return [Figure(f"RMSNorm, transformer engine / torch: time, {num_rows} rows", ratio)]


def model_pass(model: ModelConfig, compute: ComputeConfig, phase: Phase, pack: Pack, device: torch.device) -> Pass:
    """Returns a forward and backward pass of a whole model with a loss."""
    shared = model.shares_projector(phase)
    config = build_transformer_config(model, compute, ParallelConfig(), shared)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    saisa = SaisaModel(model, config, groups, Stage(0, 1, range(model.num_layers)), shared, compute.attention)
    freeze(random_weights(saisa, device), phase)
    num_features = pack.num_images * model.vision.num_tokens + pack.num_visual_padding
    features_IC = torch.randn(num_features, model.vision.hidden_size, device=device, dtype=compute_dtype(compute))
    placed = pack.to(device)

    def once() -> None:
        saisa.zero_grad(set_to_none=True)
        saisa.set_is_first_microbatch()
        saisa(placed, features_IC).sum().backward()

    return once


def utilization(
    model: ModelConfig,
    computes: dict[str, ComputeConfig],
    sizes: tuple[int, int, int],
    device: torch.device,
    rounds: int,
    peak: float | None,
) -> list[Figure]:
    """Returns the model FLOPs a second of both stages, and their fraction of the chip's peak where it is known."""
    num_samples, num_text, num_images = sizes
    pack = even_pack(*sizes, model.num_tokens_per_image)
    figures, stages = [], cast(tuple[Phase, ...], ("pretrain", "finetune"))
    for phase in stages:
        flops = num_samples * training_flops(model, phase, num_text, num_images * model.num_tokens_per_image, num_text)
        passes = {name: model_pass(model, compute, phase, pack, device) for name, compute in computes.items()}
        for name, times in time_together(passes, device, rounds).items():
            tflops, what = flops / median(times) / 1e12, f"{model.num_layers} layers, {phase}, {name}"
            figures.append(Figure(f"{what}: rate", tflops, "TFLOP/s"))
            if peak is not None:
                figures.append(Figure(f"{what}: MFU of the bf16 peak", tflops / peak))
    return figures


def machine() -> dict[str, str]:
    """Returns the GPU, and the versions of what computes on it."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"GPU": gpu, "CUDA": str(torch.version.cuda), **{package: version(package) for package in PACKAGES}}


def main(
    model: Annotated[str, typer.Option(help="a file of configs/models, for its widths")] = "saisa-vicuna-7b",
    layers: Annotated[int, typer.Option(help="layers of the model whose MFU is measured", min=1)] = 4,
    samples: Annotated[int, typer.Option(help="samples of a pack; with text, a multiple of 32", min=1)] = 8,
    text: Annotated[int, typer.Option(help="text tokens of a sample", min=1)] = 256,
    rounds: Annotated[int, typer.Option(help="timed rounds", min=1)] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the numbers here")] = None,
) -> None:
    """Measures SAISA's layers on one GPU."""
    if not torch.cuda.is_available():
        raise ValueError("bench-gpu needs a CUDA GPU that torch can see, and there is none")
    if samples * text % 32:
        raise ValueError(f"--samples {samples} times --text {text} must be a multiple of 32 for FP8; use --text 256")
    config = ModelConfig.model_validate(yaml.safe_load((MODELS / f"{model}.yaml").read_text()))
    device, bf16 = initialize_distributed(), ComputeConfig(precision="bf16")
    one_image, many_images = (samples, text, 1), (max(1, samples // 4), 4 * text, 4)
    computes = {"bf16": bf16, "bf16 full recompute": bf16.model_copy(update={"recompute": "full"})}
    if HAVE_TE:
        computes["fp8 tensorwise"] = ComputeConfig(precision="fp8")
    figures = []
    for sizes in (one_image, many_images):
        figures += compare_with_llava(config, bf16, sizes, device, rounds)
        figures += compare_kernels(config, compute_dtype(bf16), sizes, device, rounds)
    figures += compare_precisions(config, one_image, device, rounds)
    figures += compare_norms(config, samples * (text + config.vision.num_tokens), device, rounds)
    few = config.model_copy(update={"num_layers": layers})
    figures += utilization(few, computes, one_image, device, rounds, peak_tflops(LogConfig()))
    shutdown_distributed()
    report(f"SAISA's layers on a GPU, {model}", figures, json_file, machine())


if __name__ == "__main__":
    run(main)
