"""What runs beside what in a step on paper, against times added up by hand."""

from dataclasses import replace

import pytest

from benchmarks.fake_gpu.traces import Event, Load
from benchmarks.roofline import (
    Chip,
    Cost,
    collective_seconds,
    kind_of,
    model_flops,
    seconds_of,
    seconds_of_all,
    slowest_stage,
)
from pipeline.config import load_config
from tests.benchmarks.traced import STAGE2

# A kernel takes a second for each byte, a collective of two processes half a second for each.
CHIP = Chip(1.0, 1.0, 1.0, (1.0, 1.0), 1.0, 1.0, 1.0, 0.0)
BACKWARD = "backward (megatron/core/distributed/param_and_grad_buffer.py:702)"


def kernel(num_bytes: int, source: str) -> Event:
    return Event("kernel", "add", (), (), num_bytes, 0, source)


def collective(name: str, num_bytes: int, source: str) -> Event:
    return Event("collective", name, (), (), num_bytes, 0, source, (0, 1))


def test_sums_run_beside_the_backward_pass_and_gathers_beside_the_forward_pass():
    events = [
        kernel(5, "model/saisa.py:1"),
        kernel(2, BACKWARD),
        collective("reduce_scatter_tensor_coalesced", 8, BACKWARD),  # from 7 to 11
        kernel(3, BACKWARD),
        collective("reduce_scatter_tensor_coalesced", 10, BACKWARD),  # asked for at 10, from 11 to 16
        collective("reduce_scatter_base", 4, BACKWARD),  # of sequence parallelism: waited for, from 10 to 12
        kernel(1, BACKWARD),  # to 13, and 3 are left
        kernel(6, "pipeline/optimizer.py:1"),
        collective("allgather_into_tensor_coalesced", 8, "pipeline/replicas.py:1"),
        collective("allgather_into_tensor_coalesced", 6, "pipeline/replicas.py:1"),  # 7 in all, beside 5 of the forward
    ]
    assert seconds_of_all(events, CHIP) == [5, 2, 0, 3, 3, 2, 1, 6, 2, 0]


@pytest.mark.parametrize("name", ["reduce_scatter_tensor_coalesced", "allgather_into_tensor_coalesced"])
def test_what_is_asked_for_without_overlap_is_waited_for(name):
    events = [kernel(9, "model/saisa.py:1"), kernel(9, BACKWARD), collective(name, 4, "pipeline/optimizer.py:1")]
    assert seconds_of_all(events, CHIP) == [9, 9, 2]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (range(8), 7 / 8 * 720 / 360),
        (range(64), 63 / 64 * 720 / 320),  # eight adapters of a node
        (range(0, 64, 4), 15 / 16 * 720 / 80),
        (range(0, 64, 8), 7 / 8 * 720 / 40),
    ],
)
def test_a_ring_across_nodes_uses_all_adapters_of_its_processes(ranks, expected):
    chip = replace(CHIP, node_bytes=360, network_bytes=40)
    assert collective_seconds(Event("collective", "x", (), (), 720, 0, "", tuple(ranks)), chip) == expected


# FLOPs a second of bf16 products 10, of FP8 20, of attention 4 forward and 2 backward; 8 bytes; a launch takes 0.5.
RATES = Chip(40.0, 10.0, 20.0, (4.0, 2.0), 8.0, 1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event("kernel", "te.gemm", (), ("bfloat16", "bfloat16", "float32"), 8, 100, ""), 10),
        (Event("kernel", "te.gemm", (), ("float8_e4m3fn", "float8_e5m2", "bfloat16"), 8, 100, ""), 5),
        (Event("kernel", "te.gemm", (), ("bfloat16", "bfloat16", "float32"), 160, 100, ""), 20),
        (Event("kernel", "_varlen_attn", (), ("bfloat16",), 8, 8, ""), 2),
        (Event("kernel", "_varlen_attn_backward", (), ("bfloat16",), 8, 8, ""), 4),
        (Event("kernel", "add", (), ("bfloat16",), 2, 0, ""), 0.5),
        (Event("copy", "host to device", (), ("uint8",), 800, 0, ""), 0),
        (Event("collective", "allgather", (), (), 8, 0, "", (0, 1)), 0.5 + 1 / 2 * 8),
        (Event("collective", "allreduce", (), (), 8, 0, "", (0, 1)), 0.5 + 2 * 1 / 2 * 8),
        (Event("collective", "allreduce", (), (), 8, 0, "", (0,)), 0),
        (Event("collective", "send", (), (), 8, 0, "", (0, 1)), 0.5 + 8),
    ],
)
def test_an_event_takes_as_long_as_its_slower_half(event, expected):
    assert seconds_of(event, RATES) == expected


@pytest.mark.parametrize(
    ("name", "flops", "kind"),
    [
        ("te.gemm", 16, "matrix products"),
        ("te.quantize", 0, "scaling to 8 bits"),
        ("te.compute_amax", 0, "scaling to 8 bits"),
        ("te.fp8_transpose", 0, "scaling to 8 bits"),
        ("te.swiglu", 0, "bandwidth-bound kernels"),
    ],
)
def test_what_makes_8_bits_has_a_line_of_its_own(name, flops, kind):
    assert kind_of(Event("kernel", name, (), ("bfloat16", "float8_e4m3fn"), 8, flops, "model/saisa.py:1")) == kind


def test_processes_of_a_replica_share_its_flops():
    load = Load(num_packs=4, num_samples=8)
    alone, divided = (
        model_flops(load_config(STAGE2, overrides), load) for overrides in ([], ["parallel.tp=2", "parallel.pp=2"])
    )
    assert divided == tuple(flops / 4 for flops in alone)


def test_a_pipeline_takes_as_long_as_its_slowest_stage_and_idles_by_the_share_of_its_passes():
    first = {
        ("matrix products", "te.gemm", "model/saisa.py:1"): Cost(6.0, 6),
        ("encoder", "mm", "model/hf/x.py:1"): Cost(1, 1),
    }
    last = {
        ("matrix products", "te.gemm", "model/saisa.py:1"): Cost(4.0, 4),
        ("collective", "reduce_scatter_base", "backward (megatron/x.py:1)"): Cost(2.0, 4),
        ("encoder", "te.qgelu", "model/hf/x.py:1"): Cost(1.0, 1),
        ("optimizer", "te.multi_tensor_adam", "pipeline/optimizer.py:1"): Cost(3.0, 1),
    }
    found = slowest_stage([first, last], num_turns=8)
    assert found == last | {("idle", "idle", "waiting for the other stages"): Cost(1 / 8 * 6.0, 1)}
    assert slowest_stage([first], num_turns=8) == first
