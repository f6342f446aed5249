"""What the report measures. Each part is called in a process of its own and records rows as it finds them.

At `is_dry` everything is tiny and on the CPU: the code runs, its numbers mean nothing.
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from warnings import catch_warnings, simplefilter

import pytest
import torch
import yaml

from benchmarks import gpu
from benchmarks.fake_gpu.step import build_state
from benchmarks.fake_gpu.traces import WAITS_OF_A_STEP, Load, place
from benchmarks.gpu_report.made_up import make_up_weights, random_batch
from benchmarks.gpu_report.outcomes import Outcomes
from benchmarks.roofline import model_flops
from model.compute import compute_dtype
from model.config import ComputeConfig, ModelConfig
from model.memory import PackSize, peak_bytes
from pipeline.config import LogConfig, RunConfig, load_config
from pipeline.distributed import initialize_distributed
from pipeline.metrics import peak_tflops
from pipeline.step import train_step

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = ["data.max_positions=1024", "compute.gradient_accumulation_fusion=false", "compute.attention=dense"]
# Features that FP8 multiplies and heads that flash kernels take; 64 visual tokens an image.
SMALL = """hidden_size=512 ffn_hidden_size=1024 num_attention_heads=4 num_query_groups=2 head_dim=128 num_layers=2
vocab_size=512 max_positions=1024 vision.hidden_size=256 vision.num_layers=2 vision.image_size=112"""
SMALL_LOAD = Load(num_samples=4, num_text=64)
SMALL_TRAINING = ["optim.learning_rate=1e-3", "optim.warmup_fraction=0", "data.max_positions=1024"]
NUM_LOSSES, WARM_UP, ROUNDS = 4, 3, 10
# Relative. Bf16 against fp32 on a CPU differs by 0.0015 in such runs, FP8 against bf16 by 0.024 (tests/gpu).
BOUNDS = {"fp32": 1e-5, "bf16": 0.01, "fp8": 0.04}
WAIT = "called a synchronizing CUDA operation"
GB = 1e9


@dataclass(frozen=True)
class Work:
    """What a part is given: a folder that all parts share, whether it is a dry run, and where its rows go."""

    folder: Path
    is_dry: bool
    record: Callable[..., None]

    @property
    def rounds(self) -> int:
        """How often what is timed runs."""
        return 1 if self.is_dry else ROUNDS


def machine(work: Work) -> None:
    """Records what the numbers are of."""
    packages = {name: metadata.version(name) for name in ("numpy", "transformers")}
    found = {"python": platform.python_version(), "CPUs": len(os.sched_getaffinity(0)), **gpu.machine(), **packages}
    if torch.cuda.is_available():
        found["GPU memory"] = f"{torch.cuda.get_device_properties(0).total_memory / GB:.1f} GB"
    for what, value in found.items():
        work.record(what=what, value=str(value))


def kernels(work: Work, file: str) -> None:
    """Runs a file of tests/gpu. In a dry run one that needs no GPU, so that the recording is tried."""
    path = ROOT / ("tests/model/test_segments.py" if work.is_dry else f"tests/gpu/{file}")
    os.environ["SAISA_TEST_GPU"] = "1"
    options = ["-o", "addopts=-q --import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    with catch_warnings():
        status = pytest.main([*options, str(path)], plugins=[Outcomes(work.record)])
    if status != 0:
        raise SystemExit(1)


def losses(work: Work, where: str) -> None:
    """Records the losses of four steps of both stages from the same weights; those of the GPU beside the CPU's."""
    exact = {}
    if where == "gpu":
        lines = (work.folder / "losses-cpu.jsonl").read_text().splitlines()
        exact = {row["stage"]: row["losses"] for row in map(json.loads, lines)}
    is_far = False
    for stage in ("stage1", "stage2"):
        for name, compute in _precisions(exact_only=where == "cpu" or work.is_dry).items():
            found = _small_losses(stage, compute)
            row = {"stage": stage, "precision": name, "losses": found}
            if exact:
                differences = [abs(a - b) / b for a, b in zip(found, exact[stage], strict=True)]
                allowed = BOUNDS[compute.precision]
                is_near = all(difference <= allowed for difference in differences)  # what is no number is not
                row |= {"worst difference": max(differences), "allowed": allowed, "near": is_near}
                is_far |= not is_near
            work.record(**row)
    if is_far:
        raise SystemExit(1)


def _precisions(exact_only: bool) -> dict[str, ComputeConfig]:
    """Returns the ways to compute that can run here; fp32 with dense masks alone, or the others."""
    if exact_only:
        return {"fp32": ComputeConfig(precision="fp32", attention="dense")}
    return gpu.low_precisions()


def _small_losses(stage: str, compute: ComputeConfig) -> list[float]:
    sizes = [f"model.{size}" for size in SMALL.split()]
    config = load_config(CONFIGS / f"saisa-vicuna-7b-{stage}.yaml", [*sizes, *SMALL_TRAINING])
    config = config.model_copy(update={"compute": compute})
    state = build_state(config, SMALL_LOAD)
    make_up_weights(state, on_cpu=True)
    return [train_step(state, random_batch(step, state, SMALL_LOAD), 0.0).loss for step in range(NUM_LOSSES)]


def sizes_of(name: str) -> list[str]:
    """Returns the overrides that give a recipe the sizes of a file in configs/models."""
    sizes = yaml.safe_load((gpu.MODELS / f"{name}.yaml").read_text())
    sizes |= {f"vision.{part}": value for part, value in sizes.pop("vision").items()}
    return [f"model.{name}={value}" for name, value in sizes.items()]


def step(work: Work, stage: str, precision: str) -> None:
    """Records time, MFU, memory and host waits of a step with as many samples as a pack of the recipe takes."""
    overrides = [f"compute.precision={precision}", "model.num_layers=4"]
    if work.is_dry:
        overrides = ["compute.precision=fp32", *TINY, *sizes_of("saisa-tiny")]
    config = load_config(CONFIGS / f"saisa-vicuna-7b-{stage}.yaml", overrides)
    data = config.data
    num_samples = 2 if work.is_dry else data.max_images_per_pack
    load = Load(num_samples=num_samples, num_text=min(256, data.max_text_tokens_per_pack // data.max_images_per_pack))
    state = build_state(config, load)
    make_up_weights(state, on_cpu=False)
    batches = [random_batch(step, state, load) for step in range(WARM_UP + work.rounds + 1)]
    on_gpu = state.device.type == "cuda"
    for batch in batches[:WARM_UP]:
        train_step(state, batch, 0.0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, phases = [], {}
    for batch in batches[WARM_UP:-1]:
        started = time.perf_counter()
        phases = train_step(state, batch, 0.0).phase_seconds
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    _record_speed(work, config, load, median(seconds))
    for name, spent in phases.items():
        work.record(what=f"{name} of the last step", value=spent * 1e3, unit="ms")
    if on_gpu:
        pack = batches[0].micro_batches[0].pack
        num_gathered_keys = len(pack.segments.key_indices)
        size = PackSize(len(pack.positions_T), len(pack.visual_positions_I), pack.num_targets, num_gathered_keys)
        settings = config.optim.moments, 1, config.parallel.reduce_in_bf16
        expected = peak_bytes(config.model, config.phase, config.compute, size, *settings)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        work.record(what="peak memory, allocated", value=allocated / GB, unit="GB", expected=expected / GB)
        work.record(what="peak memory, reserved", value=reserved / GB, unit="GB")
    waits = host_waits(lambda: train_step(state, batches[-1], 0.0))
    expected = WAITS_OF_A_STEP if on_gpu else {}
    work.record(what="host waits of a step", value=waits.total(), expected=sum(expected.values()))
    for where in dict.fromkeys([*expected, *waits]):
        work.record(what=f"waits in {where}", value=waits[where], expected=expected.get(where, 0))


def _record_speed(work: Work, config: RunConfig, load: Load, seconds: float) -> None:
    flops, with_encoder = model_flops(config, load)
    work.record(what=f"step, {load.num_samples} samples of {load.num_text} text rows", value=seconds * 1e3, unit="ms")
    work.record(what="model FLOPs a second, without the encoder", value=flops / seconds / 1e12, unit="TFLOP/s")
    if (peak := peak_tflops(LogConfig())) is not None:
        work.record(what="MFU of the bf16 peak, without the encoder", value=flops / seconds / 1e12 / peak)
        work.record(what="MFU of the bf16 peak, with it", value=with_encoder / seconds / 1e12 / peak)


def host_waits(run: Callable[[], object]) -> Counter[str]:
    """Returns by file and function how often torch says that the host waits for the GPU; it does not see all waits."""
    if not torch.cuda.is_available():
        run()
        return Counter()
    torch.cuda.synchronize()
    with catch_warnings(record=True) as caught:
        simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if WAIT in str(warning.message)]
    return Counter(place(warning.filename.removeprefix(f"{ROOT}/"), warning.lineno) for warning in found)


def _layers(work: Work) -> tuple[ModelConfig, ComputeConfig, tuple[int, int, int]]:
    """Returns the widths, the precision and the samples, text tokens and images of what `benchmarks.gpu` measures."""
    file, compute, sizes = ("saisa-vicuna-7b", ComputeConfig(precision="bf16"), (8, 256, 1))
    if work.is_dry:
        file, compute, sizes = ("saisa-tiny", ComputeConfig(precision="fp32"), (2, 16, 1))
    return ModelConfig.model_validate(yaml.safe_load((gpu.MODELS / f"{file}.yaml").read_text())), compute, sizes


def llava(work: Work) -> None:
    """Records a layer of SAISA against one like LLaVA's."""
    (model, compute, sizes), device = _layers(work), initialize_distributed()
    for figure in gpu.compare_with_llava(model, compute, sizes, device, work.rounds):
        work.record(what=figure.what, value=figure.value, unit=figure.unit)


def backends(work: Work) -> None:
    """Records attention kernels against dense masks, FP8 against bf16 and norms against each other."""
    (model, compute, sizes), device = _layers(work), initialize_distributed()
    many_images = (max(1, sizes[0] // 4), 4 * sizes[1], 4)
    for one in (sizes, many_images):
        for figure in gpu.compare_kernels(model, compute_dtype(compute), one, device, work.rounds):
            work.record(what=figure.what, value=figure.value, unit=figure.unit)
    num_rows = sizes[0] * (sizes[1] + model.num_tokens_per_image)
    figures = gpu.compare_precisions(model, sizes, device, work.rounds)
    for figure in figures + gpu.compare_norms(model, num_rows, device, work.rounds):
        work.record(what=figure.what, value=figure.value, unit=figure.unit)


def prefill(work: Work) -> None:
    """Records how long an export and transformers' LLaVA of its sizes read a prompt with an image."""
    from benchmarks.gpu_report.prefill import build_models, prompt

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, compute, _ = _layers(work)
    models = build_models(sizes.model_copy(update={"num_layers": min(4, sizes.num_layers)}), compute, device)
    with torch.no_grad():
        for num_prompts, num_text in ((1, 64), (8, 64), (8, 256)):
            inputs = prompt(sizes, num_prompts, num_text, compute, device)
            passes = {
                name: partial(model, **inputs, logits_to_keep=1, use_cache=True) for name, model in models.items()
            }
            seconds = gpu.time_together(passes, device, work.rounds)
            times = {name: median(found) * 1e3 for name, found in seconds.items()}
            what = f"{num_prompts} prompts of {num_text} text tokens and an image"
            work.record(what=what, **times, unit="ms", **{"saisa / llava": times["saisa"] / times["llava"]})
