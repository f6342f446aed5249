"""Training steps in FP8 on a fake GPU: which products are in 8 bits, how often weights are, what stays in fp32."""

from collections import Counter
from math import prod

import pytest
import yaml

from benchmarks.fake_gpu.traces import Case, Load, Trace
from model.config import ModelConfig
from model.flops import matrix_products
from model.memory import resident_bytes
from pipeline.config import load_config
from tests.benchmarks.traced import CONFIGS, STAGE1, STAGE2, shared_collectives

FP8 = ("model.num_layers=2", "model.vision.num_layers=3", "compute.precision=fp8")
TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
DELAYED, TENSORWISE, BLOCKWISE = (f"compute.fp8_recipe={recipe}" for recipe in ("delayed", "tensorwise", "blockwise"))
TWO_PACKS = Load(num_packs=2, num_samples=4)
UNEVEN = Load(num_samples=3, num_text=250)  # 750 text rows and 1,728 visual rows
CASES = {
    "delayed": Case(STAGE2, (*FP8, DELAYED), TWO_PACKS),
    "tensorwise": Case(STAGE2, (*FP8, TENSORWISE), TWO_PACKS),
    "blockwise": Case(STAGE2, (*FP8, BLOCKWISE), TWO_PACKS),
    "tensorwise, resumed": Case(STAGE2, (*FP8, TENSORWISE), TWO_PACKS, is_resumed=True),
    "recomputed": Case(STAGE2, (*FP8, TENSORWISE, "compute.recompute=full"), TWO_PACKS),
    "edges": Case(STAGE2, ("model.num_layers=3", *FP8[1:], TENSORWISE, "compute.bf16_edge_layers=1"), UNEVEN),
    "no images": Case(STAGE2, (*FP8, TENSORWISE), Load(num_samples=3, num_text=250, num_images=0)),
    "stage 1": Case(STAGE1, (*FP8, TENSORWISE), UNEVEN),
    "blockwise, tp 2": Case(STAGE2, (*FP8, BLOCKWISE, *TP2), UNEVEN),
    "delayed, tp 2": Case(STAGE2, (*FP8, DELAYED, *TP2), UNEVEN),
    "delayed, tp 2, other replica": Case(STAGE2, (*FP8, DELAYED, *TP2), Load(2, 3, 250), rank=2),
    "tensorwise, pp 2": Case(STAGE2, (*FP8, TENSORWISE, "parallel.pp=2"), TWO_PACKS),
    "tensorwise, pp 2, last": Case(STAGE2, (*FP8, TENSORWISE, "parallel.pp=2"), TWO_PACKS, rank=4),
}
SLOW = ["recomputed", "tensorwise, resumed", "edges", *(name for name in CASES if "pp 2" in name or "other" in name)]
ROWS = {"blockwise, tp 2": (768, 1792), "delayed, tp 2": (768, 1728), "no images": (768, 32)}
"""Text and visual rows after they are filled up; those of `UNEVEN` in 32s are 768 and 1,728."""


def named(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test by cases."""
    return pytest.mark.parametrize("name", names)


def model_of(name: str) -> ModelConfig:
    sizes = yaml.safe_load((CONFIGS / "models" / "saisa-vicuna-7b.yaml").read_text())
    return ModelConfig.model_validate({**sizes, "num_layers": 3 if name == "edges" else 2})


def products(trace: Trace, in_8_bits: bool) -> int:
    """FLOPs of the model's matrix products, without those of attention."""
    return sum(
        event.flops
        for event in trace.events
        if event.name in ("te.gemm", "mm", "addmm")
        and not event.source.startswith("model/hf/vision_saisa.py")
        and (event.dtypes[0].startswith("float8") and event.dtypes[1].startswith("float8")) == in_8_bits
    )


@named(*(name for name in CASES if not any(part in name for part in ("tp 2", "pp 2", "resumed"))))
def test_layers_multiply_in_8_bits_and_the_head_does_not(traces, name):
    """And no edge layer that is to stay in bf16."""
    load, model = CASES[name].load, model_of(name)
    text, visual = ROWS.get(name, (768, 1728) if load == UNEVEN else (1024, 2304))
    targets = load.num_samples * int(load.num_text * load.target_fraction)
    p = matrix_products(model, text, visual, targets)
    projector, rest = 2 * p.projector_in + 3 * p.projector_out, p.linear_q + p.linear_other
    layer, head = projector + 3 * rest, 3 * p.head
    if name == "stage 1":
        in_8_bits, in_16_bits = projector + 2 * (2 * rest) - p.linear_q, 2 * p.head
    elif name == "edges":
        in_8_bits, in_16_bits = layer, 2 * layer + head
    else:
        again = p.projector_in + p.projector_out + rest if name == "recomputed" else 0
        in_8_bits, in_16_bits = 2 * (layer + again), head
    found = products(traces[name], in_8_bits=True), products(traces[name], in_8_bits=False)
    assert found == (load.num_packs * in_8_bits, load.num_packs * in_16_bits)


@named("delayed", "tensorwise", "blockwise", "recomputed")
def test_weights_are_quantized_once_a_step_and_not_once_a_pack(traces, name):
    """Of two layers: projector, queries, keys and values, output, FFN. What is computed again takes what is there."""
    weights = {(4096, 1024): 2, (4096, 4096): 6, (8192, 4096): 2, (22016, 4096): 2, (4096, 11008): 2}
    quantized = Counter(event.shapes[0] for event in traces[name].events if event.name == "te.quantize")
    assert {shape: quantized[shape] for shape in weights} == weights


@named(*(name for name in CASES if "tp 2" in name))
def test_rows_travel_in_8_bits_within_a_layer(traces, name):
    """Transformer Engine gathers them in bf16, after a warning, where a process's rows are no whole blocks."""
    gathered = {
        dtype
        for event in traces[name].events
        if event.name.startswith("allgather") and "transformer_engine/pytorch/distributed.py" in event.source
        for dtype in event.dtypes
    }
    assert gathered == {"uint8"}


@named("delayed", "tensorwise", "blockwise", "stage 1", "edges", "no images")
def test_nothing_large_is_fp32_but_sums_of_weight_gradients(traces, name):
    """Statistics of norms, softmax and loss are fp32, one number a row, and rotary angles, one vector a row."""
    found = {
        (event.name, event.source.partition(" ")[0])
        for event in traces[name].events
        if event.kind == "kernel"
        and event.source.startswith(("model/", "backward"))
        and not event.source.startswith("model/hf/")  # pixels come in fp32
        and any(d == "float32" and prod(s) > 4096 * 128 for s, d in zip(event.shapes, event.dtypes, strict=True))
    }
    # Stage 2 adds gradients up within the products, but for embedding and head.
    assert found == {("add_", "backward")} | (set() if name == "stage 1" else {("te.gemm", "backward")})


@named("delayed", "tensorwise", "blockwise")
def test_gradients_have_more_range_where_a_tensor_has_one_scale(traces, name):
    dtypes = {dtype for event in traces[name].events if event.name == "te.gemm" for dtype in event.dtypes}
    assert ("float8_e5m2" in dtypes) == (name != "blockwise") and "float8_e4m3fn" in dtypes


def test_scales_are_agreed_on_within_a_replica(traces):
    """Replicas have different numbers of packs: they cannot meet there."""
    found = {
        event.ranks
        for event in traces["delayed, tp 2"].events
        if event.name == "allreduce" and "transformer_engine/" in event.source
    }
    assert found == {(0, 1)}


@pytest.mark.parametrize(
    "pair",
    [
        ("delayed, tp 2", "delayed, tp 2, other replica"),
        ("tensorwise, pp 2", "tensorwise, pp 2, last"),
    ],
)
def test_processes_of_a_group_call_the_same_collectives_in_the_same_order(traces, pair):
    """Replicas have different numbers of packs: scales that they agreed on in each pack would hang the run."""
    ranks = {CASES[name].rank for name in pair}
    first, second = (shared_collectives(traces[name], ranks) for name in pair)
    assert first == second != []


@named(*(name for name in CASES if "pp 2" not in name))
def test_the_host_waits_once_a_step(traces, name):
    waits = [(event.name, event.source) for event in traces[name].events if event.kind == "wait"]
    assert [(what, where.partition(":")[0]) for what, where in waits] == [
        ("device to host, pageable", "model/transfer.py")
    ]


@named("delayed", "blockwise", "recomputed", "edges", "stage 1")
def test_weights_are_held_in_8_bits_twice_besides(traces, name):
    config = load_config(CASES[name].config, [*CASES[name].overrides])
    expected = resident_bytes(config.model, config.phase, config.compute, "fp32", num_replicas=8)
    expected += 2 * 3 * 12 * 1024**2  # the encoder
    assert traces[name].resident_bytes == pytest.approx(expected, rel=0.01)


def test_a_step_after_a_checkpoint_is_the_same_step(traces):
    """No layout, copy or memory of it differs: 8-bit weights are made anew, moments and fp32 weights are in place."""
    assert traces["tensorwise, resumed"] == traces["tensorwise"]
