"""Training steps of the 7B recipes on a fake GPU: what they make it do, against formulas and lists written by hand."""

from collections import Counter
from itertools import pairwise

import pytest
import yaml

from benchmarks.fake_gpu.traces import WAITS_OF_A_STEP, Case, Load, Trace, place
from model.config import ModelConfig
from model.flops import encoder_forward_flops, matrix_products
from model.memory import PackSize, activation_bytes, checkpoint_bytes, resident_bytes
from pipeline.config import load_config
from tests.benchmarks.traced import CONFIGS, STAGE1, STAGE2, shared_collectives

SMALL = ("model.num_layers=2", "model.vision.num_layers=3")  # at the recipe's widths
TP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
DIVIDED = (*SMALL, *TP2, "parallel.pp=2")

CASES = {
    "stage 1": Case(STAGE1, SMALL),
    "stage 2": Case(STAGE2, SMALL),
    "stage 2, a layer more": Case(STAGE2, ("model.num_layers=3", SMALL[1])),
    "64 ranks": Case(STAGE2, (*SMALL, "parallel.reduce_in_bf16=true"), world_size=64),
    "selective": Case(STAGE2, (*SMALL, "compute.recompute=selective")),
    "full": Case(STAGE2, (*SMALL, "compute.recompute=full")),
    "stage 1, full": Case(STAGE1, (*SMALL, "compute.recompute=full")),
    "stage 1, tp 2": Case(STAGE1, (*SMALL, *TP2)),
    "llama 3": Case(CONFIGS / "saisa-llama3-8b-stage2.yaml", SMALL, Load(num_samples=4, num_text=512)),
    "llava": Case(STAGE2, (*SMALL, "model.architecture=llava")),
    "no images": Case(STAGE2, SMALL, Load(num_images=0)),
    "tp 2, rank 0": Case(STAGE2, (*SMALL, *TP2)),
    "tp 2, rank 1": Case(STAGE2, (*SMALL, *TP2), rank=1),
    "pp 2, first": Case(STAGE2, (*SMALL, "parallel.pp=2"), Load(num_packs=2)),
    "pp 2, last": Case(STAGE2, (*SMALL, "parallel.pp=2"), Load(num_packs=2), rank=4),
    "1 rank": Case(STAGE2, SMALL, Load(num_samples=4), world_size=1),
    "1,024 ranks": Case(STAGE2, DIVIDED, Load(1, 4), world_size=1024),
    "1,024 ranks, other replica": Case(STAGE2, DIVIDED, Load(2, 4), world_size=1024, rank=256),
    "1,024 ranks, last stage": Case(STAGE2, DIVIDED, Load(1, 4), world_size=1024, rank=512),
}
SLOW = ["stage 1, tp 2", "stage 1, full", *(name for name in CASES if "1,024" in name)]


def model_of(name: str) -> ModelConfig:
    sizes = yaml.safe_load((CONFIGS / "models" / "saisa-vicuna-7b.yaml").read_text())
    sizes["vision"]["num_layers"] = 3
    return ModelConfig.model_validate({**sizes, "num_layers": 3 if "more" in name else 2})


def products(trace: Trace, of_encoder: bool) -> int:
    """FLOPs of the matrix products, without those of attention, of the encoder or of all else."""
    return sum(
        event.flops
        for event in trace.events
        if event.name in ("te.gemm", "mm", "addmm", "convolution")
        and event.source.startswith("model/hf/vision_saisa.py") == of_encoder
    )


def waits(trace: Trace) -> Counter[str]:
    lines = [event.source.partition(" ")[0].partition(":") for event in trace.events if event.kind == "wait"]
    return Counter(place(file, int(line)) for file, _, line in lines)


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_a_step_and_before_the_update(traces, name):
    """Every other wait would let the GPU run dry; an update before it would go on with what is not finite."""
    assert waits(traces[name]) == WAITS_OF_A_STEP == {"model/transfer.py, read_values": 1}
    order = dict.fromkeys(
        event.name for event in traces[name].events if event.kind == "wait" or event.name.startswith("te.multi")
    )
    assert [*order] == [
        "te.multi_tensor_l2norm",
        "te.multi_tensor_scale_tensor",
        "device to host, pageable",
        "te.multi_tensor_adam",
    ]


def test_gradients_are_summed_during_the_backward_pass_and_weights_collected_after_the_update(traces):
    """In buckets of 40 million parameters or more: gradients from the end of the model on, weights from its start."""
    events = traces["stage 2"].events
    d, f, c, v = 4096, 11008, 1024, 32000
    of_mlp = [d + f * d, 2 * f * d]  # the norm behind, down; up and gate
    attention, rest = (
        d + 3 * d * d,
        d * d + d + (d * d + d) + (c * d + d),
    )  # a norm, out, keys; queries, norm, projector
    parameters = [v * d, *of_mlp, attention, rest + f * d, 2 * f * d, attention, rest + v * d]
    sums, gathers, updates = (
        [at for at, event in enumerate(events) if event.name == name]
        for name in ("reduce_scatter_tensor_coalesced", "allgather_into_tensor_coalesced", "te.multi_tensor_adam")
    )
    assert [events[at].num_bytes for at in sums] == [4 * number for number in parameters]
    assert all(events[at].source.startswith("backward (") for at in sums)
    for one, next_one in pairwise(sums):
        assert any(event.name == "te.gemm" for event in events[one:next_one]), "nothing goes on beside it"
    assert [events[at].num_bytes for at in gathers] == [2 * number for number in reversed(parameters)]
    assert updates[-1] < gathers[0] and not any(event.kind == "kernel" for event in events[gathers[0] :])


def test_sums_in_bf16_have_half_the_bytes(traces):
    two, four = (
        sum(event.num_bytes for event in traces[name].events if event.name == "reduce_scatter_tensor_coalesced")
        for name in ("64 ranks", "stage 2")
    )
    assert 2 * two == pytest.approx(four, rel=1e-3)  # buckets are filled up to a multiple of the replicas


def test_the_first_pack_overwrites_weight_gradients_and_the_next_adds_to_them(traces):
    """So a step clears nothing but what autograd adds up: embedding and head, norms and biases."""
    d, v, num_products = 4096, 32000, 7  # of a layer: the projector's two, queries, keys, output, the FFN's two
    for name, num_layers, expected in (
        ("stage 2", 2, [False] * 2 * num_products),
        ("pp 2, first", 1, [False] * num_products + [True] * num_products),
        ("full", 2, [True] * 2 * num_products),  # where all is cleared
    ):
        events = traces[name].events
        sums = [event for event in events if event.name == "te.gemm" and event.dtypes[-1] == "float32"]
        assert [event.dtypes[-2] == "float32" for event in sums] == expected, name
        cleared = [event for event in events if "zero_" in event.name and event.source.startswith("pipeline/replicas")]
        ends = v * d if name == "pp 2, first" else 2 * v * d + d
        parameters = ends + num_layers * 4 * d
        parameters += num_layers * (4 * d * d + d * d + 1024 * d + 3 * d * 11008) if name == "full" else 0
        assert [event.num_bytes for event in cleared] == [pytest.approx(4 * parameters, rel=1e-5)], name


def test_a_layer_takes_so_many_kernels_and_the_encoder_one_for_its_activation(traces):
    """Counted, so that one more is seen."""
    two, three = (
        sum(event.kind == "kernel" and not event.source.startswith("pipeline/") for event in traces[name].events)
        for name in ("stage 2", "stage 2, a layer more")
    )
    assert three - two == 58
    names = Counter(event.name for event in traces["stage 2"].events)
    assert (names["te.qgelu"], names["sigmoid"]) == (2, 0)


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "64 ranks", "no images"])
def test_matrix_products_are_those_of_the_formulas(traces, name):
    """Stage 1 multiplies by nothing for the weights of the language model; visual rows pass no FFN."""
    load, model = CASES[name].load, model_of(name)
    text, targets = (load.num_samples * n for n in (load.num_text, load.num_targets))
    p = matrix_products(model, text, load.num_samples * load.num_images * model.vision.num_tokens, targets)
    n = model.num_layers
    expected = n * (2 * p.projector_in + 3 * p.projector_out + 3 * p.linear_q + 3 * p.linear_other) + 3 * p.head
    if name == "stage 1":
        projector = 2 * p.projector_in + 3 * p.projector_out
        expected = projector + (2 * n - 1) * p.linear_q + 2 * (n * p.linear_other + p.head)
    assert products(traces[name], of_encoder=False) == expected


def test_visual_tokens_of_llava_pass_all_of_a_layer_but_the_last(traces):
    """One projector, a layer with as many rows as tokens, and one whose visual rows are keys and values only."""
    load, (d, c, f, v) = CASES["llava"].load, (4096, 1024, 11008, 32000)
    text, targets, visual = (load.num_samples * n for n in (load.num_text, load.num_targets, 576))
    keys_values, rest = 2 * d * d, 2 * d * d + 3 * d * f
    layers = 3 * ((text + visual) * (2 * keys_values + rest) + text * rest)
    assert products(traces["llava"], of_encoder=False) == 2 * (
        visual * (2 * c * d + 3 * d * d) + layers + 3 * targets * d * v
    )


def test_the_encoder_costs_what_its_formula_says(traces):
    model, num_images = model_of("stage 2"), CASES["stage 2"].load.num_samples
    whole = encoder_forward_flops(model.vision, 4 * model.vision.hidden_size)
    attention = 2 * 2 * 2 * (model.vision.num_tokens + 1) ** 2 * model.vision.hidden_size  # of two layers
    assert products(traces["stage 2"], of_encoder=True) == num_images * (whole - attention)


@pytest.mark.parametrize(("name", "num_replicas"), [("stage 1", 8), ("stage 2", 8), ("64 ranks", 64), ("1 rank", 1)])
def test_memory_between_steps_is_weights_gradients_and_a_share_of_the_optimizer(traces, name, num_replicas):
    """bf16 weights, fp32 gradients; fp32 weights and two moments, divided over the replicas; the encoder."""
    config = load_config(CASES[name].config, [*CASES[name].overrides])
    in_bf16 = config.parallel.reduce_in_bf16
    expected = resident_bytes(config.model, config.phase, config.compute, "fp32", num_replicas, in_bf16)
    expected += 2 * 3 * 12 * 1024**2  # the encoder
    assert traces[name].resident_bytes == pytest.approx(expected, rel=0.01)
    assert traces[name].start_bytes <= traces[name].resident_bytes, "something exists twice"


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "64 ranks", "llama 3"])
def test_a_process_writes_its_share_of_a_checkpoint(traces, name):
    """Also of moments in bf16, which stay that: a process gathers nothing and converts nothing."""
    config = load_config(CASES[name].config, [*CASES[name].overrides])
    whole = checkpoint_bytes(config.model, config.phase, config.optim.moments)
    assert traces[name].saved_bytes == pytest.approx(whole / CASES[name].world_size, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("no images", "llava") and "1,024" not in name])
def test_activations_are_those_of_the_formula(traces, name):
    """The most that is held above what is held between steps, at every way to divide and to compute again."""
    case, trace = CASES[name], traces[name]
    config, load = load_config(case.config, [*case.overrides]), case.load
    text, visual, targets = (load.num_samples * n for n in (load.num_text, load.num_images * 576, load.num_text // 2))
    before_image = load.num_samples * load.num_text // 4  # keys of the first segments, which the second need again
    size = PackSize(text, visual, targets, text + visual + before_image)
    formula = activation_bytes(config.model, config.phase, config.compute, size, config.parallel)
    num_layers, is_last = config.model.num_layers // config.parallel.pp, name != "pp 2, first"
    num_under_way = 1 if is_last else 2
    peak = formula.peak(num_layers, is_last, num_under_way)
    assert trace.peak_bytes - trace.resident_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    "pair",
    [
        ("tp 2, rank 0", "tp 2, rank 1"),
        ("pp 2, first", "pp 2, last"),
        ("1,024 ranks", "1,024 ranks, other replica"),
        ("1,024 ranks", "1,024 ranks, last stage"),
    ],
)
def test_processes_of_a_group_call_the_same_collectives_in_the_same_order(traces, pair):
    """A collective that one of them leaves out is a run that hangs for ever."""
    ranks = {CASES[name].rank for name in pair}
    first, second = (shared_collectives(traces[name], ranks) for name in pair)
    assert first == second != []
