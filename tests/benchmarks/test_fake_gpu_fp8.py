"""Training steps in FP8 on a fake GPU: which products are in 8 bits, how often weights are, what stays in fp32."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import yaml

from benchmarks.fake_gpu.traces import Case, Load, Trace
from model.config import ModelConfig
from model.flops import matrix_products
from model.memory import PackSize, activation_bytes, checkpoint_bytes, resident_bytes
from pipeline.config import load_config
from tests.benchmarks.traced import CONFIGS, STAGE1, STAGE2, shared_collectives

FP8 = ("model.num_layers=2", "model.vision.num_layers=3", "compute.precision=fp8")
TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
DELAYED, TENSORWISE, BLOCKWISE = (f"compute.fp8_recipe={recipe}" for recipe in ("delayed", "tensorwise", "blockwise"))
WEIGHTS, EDGE = "compute.fp8_weights=true", "compute.bf16_edge_layers=1"
OF_TWO_LAYERS = {(4096, 1024): 2, (4096, 4096): 6, (8192, 4096): 2, (22016, 4096): 2, (4096, 11008): 2}
"""Weights by shape: projectors, queries, keys and values, output, FFN."""
TWO_PACKS = Load(num_packs=2, num_samples=4)
FEW_TARGETS = Load(target_fraction=1 / 32)  # so that the head is not what holds most
UNEVEN = Load(num_samples=3, num_text=250)  # 750 text rows and 1,728 visual rows
CASES = {
    "delayed": Case(STAGE2, (*FP8, DELAYED), TWO_PACKS),
    "tensorwise": Case(STAGE2, (*FP8, TENSORWISE), TWO_PACKS),
    "blockwise": Case(STAGE2, (*FP8, BLOCKWISE), TWO_PACKS),
    "tensorwise, resumed": Case(STAGE2, (*FP8, TENSORWISE), TWO_PACKS, is_resumed=True),
    "delayed, resumed": Case(STAGE2, (*FP8, DELAYED), TWO_PACKS, is_resumed=True),
    "weights": Case(STAGE2, (*FP8, TENSORWISE, WEIGHTS), TWO_PACKS),
    "weights, resumed": Case(STAGE2, (*FP8, TENSORWISE, WEIGHTS), TWO_PACKS, is_resumed=True),
    "weights, edges": Case(STAGE2, ("model.num_layers=3", *FP8[1:], BLOCKWISE, WEIGHTS, EDGE), UNEVEN),
    "weights, tp 2": Case(STAGE2, (*FP8, TENSORWISE, WEIGHTS, *TP2), FEW_TARGETS),
    "weights, recomputed": Case(STAGE2, (*FP8, TENSORWISE, WEIGHTS, "compute.recompute=selective"), FEW_TARGETS),
    "recomputed": Case(STAGE2, (*FP8, TENSORWISE, "compute.recompute=full"), TWO_PACKS),
    "edges": Case(STAGE2, ("model.num_layers=3", *FP8[1:], TENSORWISE, EDGE), UNEVEN),
    "no images": Case(STAGE2, (*FP8, TENSORWISE), Load(num_samples=3, num_text=250, num_images=0)),
    "stage 1": Case(STAGE1, (*FP8, TENSORWISE), UNEVEN),
    "blockwise, tp 2": Case(STAGE2, (*FP8, BLOCKWISE, *TP2), UNEVEN),
    "delayed, tp 2": Case(STAGE2, (*FP8, DELAYED, *TP2), UNEVEN),
    "delayed, tp 2, other replica": Case(STAGE2, (*FP8, DELAYED, *TP2), Load(2, 3, 250), rank=2),
    "tensorwise, pp 2": Case(STAGE2, (*FP8, TENSORWISE, "parallel.pp=2"), TWO_PACKS),
    "tensorwise, pp 2, last": Case(STAGE2, (*FP8, TENSORWISE, "parallel.pp=2"), TWO_PACKS, rank=4),
}
SLOW = ["blockwise", "delayed", "recomputed", "edges", "no images"]
SLOW += [name for name in CASES if name.startswith("weights,")]
SLOW += [name for name in CASES if any(part in name for part in ("pp 2", "other", "resumed"))]
ROWS = {"blockwise, tp 2": (768, 1792), "delayed, tp 2": (768, 1728), "no images": (768, 32)}
"""Text and visual rows that are filled up to more than multiples of 32."""


def named(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test by cases."""
    return pytest.mark.parametrize("name", names)


def model_of(name: str) -> ModelConfig:
    sizes = yaml.safe_load((CONFIGS / "models" / "saisa-vicuna-7b.yaml").read_text())
    return ModelConfig.model_validate({**sizes, "num_layers": 3 if "edges" in name else 2})


def rows_of(name: str) -> tuple[int, int]:
    """Text and visual rows of a pack, filled up to multiples of 32 or by `ROWS`."""
    load = CASES[name].load
    rows = (load.num_samples * load.num_text, load.num_samples * load.num_images * 576)
    return ROWS.get(name) or (-(-rows[0] // 32) * 32, -(-rows[1] // 32) * 32)


def products(trace: Trace, in_8_bits: bool) -> int:
    """FLOPs of the model's matrix products, without those of attention."""
    return sum(
        event.flops
        for event in trace.events
        if event.name in ("te.gemm", "mm", "addmm")
        and not event.source.startswith("model/hf/vision_saisa.py")
        and (event.dtypes[0].startswith("float8") and event.dtypes[1].startswith("float8")) == in_8_bits
    )


@named(*(name for name in CASES if not any(part in name for part in ("tp 2", "pp 2", "resumed", "weights, rec"))))
def test_layers_multiply_in_8_bits_and_the_head_does_not(traces, name):
    """And no edge layer that is to stay in bf16."""
    load, model = CASES[name].load, model_of(name)
    text, visual = rows_of(name)
    targets = load.num_samples * int(load.num_text * load.target_fraction)
    p = matrix_products(model, text, visual, targets)
    projector, rest = 2 * p.projector_in + 3 * p.projector_out, p.linear_q + p.linear_other
    layer, head = projector + 3 * rest, 3 * p.head
    if name == "stage 1":
        in_8_bits, in_16_bits = projector + 2 * (2 * rest) - p.linear_q, 2 * p.head
    elif "edges" in name:
        in_8_bits, in_16_bits = layer, 2 * layer + head
    else:
        again = p.projector_in + p.projector_out + rest if name == "recomputed" else 0
        in_8_bits, in_16_bits = 2 * (layer + again), head
    found = products(traces[name], in_8_bits=True), products(traces[name], in_8_bits=False)
    assert found == (load.num_packs * in_8_bits, load.num_packs * in_16_bits)


@named("delayed", "tensorwise", "blockwise", "recomputed")
def test_weights_are_quantized_once_a_step_and_not_once_a_pack(traces, name):
    """What is computed again takes what is there."""
    quantized = Counter(event.shapes[0] for event in traces[name].events if event.name == "te.quantize")
    assert {shape: quantized[shape] for shape in OF_TWO_LAYERS} == OF_TWO_LAYERS


@named("weights")
def test_weights_that_are_held_in_8_bits_alone_are_quantized_by_their_owners(traces, name):
    """Each process quantizes what it updates, all collect 8 bits of it, and transpose each weight once a step."""
    num_in_8_bits = sum(prod(shape) * number for shape, number in OF_TWO_LAYERS.items())
    num_others = 2 * 32000 * 4096 + 5 * 4096 + 4 * 4096  # embedding and head, norms, biases of projectors
    quantized, transposed, gathered = (
        [event for event in traces[name].events if event.name == which]
        for which in ("te.quantize", "te.fp8_transpose", "allgather_into_tensor_coalesced")
    )
    by_owner = [event for event in quantized if event.source.startswith("pipeline/optimizer.py")]
    assert not {event.shapes[0] for event in quantized} & OF_TWO_LAYERS.keys()
    assert Counter(event.shapes[0] for event in transposed) == OF_TWO_LAYERS
    assert sum(prod(event.shapes[0]) for event in by_owner) == pytest.approx(num_in_8_bits / 8, rel=1e-3)
    assert sum(event.num_bytes for event in gathered) == pytest.approx(num_in_8_bits + 2 * num_others, rel=1e-3)


@named("weights", "weights, edges")
def test_checkpoints_have_weights_that_are_held_in_8_bits_in_16(traces, name):
    config = load_config(CASES[name].config, [*CASES[name].overrides])
    whole = checkpoint_bytes(config.model, config.phase, config.optim.moments)
    assert traces[name].saved_bytes == pytest.approx(whole / 8, rel=1e-3)


@named(*(name for name in CASES if "tp 2" in name))
def test_rows_travel_in_8_bits_within_a_layer(traces, name):
    """Transformer Engine gathers them in bf16, after a warning, where a process's rows are no whole blocks."""
    gathered = {
        max(zip(event.shapes, event.dtypes, strict=True), key=lambda item: prod(item[0]))[1]  # others are scales
        for event in traces[name].events
        if event.name.startswith("allgather") and "transformer_engine/pytorch/distributed.py" in event.source
    }
    assert gathered == {"uint8"}


@named("delayed", "tensorwise", "blockwise", "weights", "stage 1", "edges", "no images")
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


@named("delayed", "blockwise", "weights", "weights, edges", "recomputed", "edges", "stage 1")
def test_weights_are_held_in_8_bits_twice(traces, name):
    """By row and by column, beside the bf16 weights or, if so set, in their place."""
    config = load_config(CASES[name].config, [*CASES[name].overrides])
    expected = resident_bytes(config.model, config.phase, config.compute, "fp32", num_replicas=8)
    expected += 2 * 3 * 12 * 1024**2  # the encoder
    assert traces[name].resident_bytes == pytest.approx(expected, rel=0.01)


@named(*(name for name in CASES if not any(part in name for part in ("resumed", "other"))))
def test_activations_are_those_of_the_formula(traces, name):
    """Inputs of linear layers are kept in 8 bits; what other operations keep is not."""
    case = CASES[name]
    config, load, (text, visual) = load_config(case.config, [*case.overrides]), case.load, rows_of(name)
    before_image = load.num_samples * (load.num_text // 4)  # keys of the first segments, which the second need again
    size = PackSize(text, visual, load.num_samples * load.num_targets, text + visual + before_image)
    formula = activation_bytes(config.model, config.phase, config.compute, size, config.parallel)
    is_last = name != "tensorwise, pp 2"
    peak = formula.peak(config.model.num_layers // config.parallel.pp, is_last, 1 if is_last else 2)
    assert traces[name].peak_bytes - traces[name].resident_bytes == pytest.approx(peak, rel=0.05)


@named("tensorwise", "delayed", "weights")
def test_a_step_after_a_checkpoint_is_the_same_step(traces, name):
    """No layout, copy or memory of it differs: 8-bit weights are made anew, scales, moments, fp32 weights in place."""
    # Megatron-core has the weights of a bucket in no order, and transposes them in that.
    resumed, other = (
        replace(trace, events=sorted(trace.events, key=str)) for trace in (traces[f"{name}, resumed"], traces[name])
    )
    assert resumed == other
