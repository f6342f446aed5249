"""Attention's kernels on a fake GPU: which one runs, on what, and what it costs, against rectangles counted by hand.

What kernels want of shapes, types, strides, offsets and lengths is checked where they are called; see
`benchmarks/fake_gpu/attention.py`.
"""

from collections import Counter

import numpy as np
import pytest

from benchmarks.fake_gpu.traces import Case, Load, Trace
from tests.benchmarks.traced import CONFIGS, STAGE2

SMALL = ("model.num_layers=2", "model.vision.num_layers=3")
FEW, MANY = Load(num_samples=2), Load(num_samples=2, num_text=600, num_images=5)
CASES = {
    "auto, few images": Case(STAGE2, SMALL, FEW),
    "auto, many images": Case(STAGE2, SMALL, MANY),
    "flash_attn": Case(STAGE2, (*SMALL, "compute.attention=flash_attn"), MANY),
    "block, grouped heads": Case(
        CONFIGS / "saisa-llama3-8b-stage2.yaml",
        (*SMALL, "compute.attention=block", "parallel.tp=2", "parallel.sequence_parallel=true"),
        FEW,
    ),
}
KERNELS = {
    "auto, few images": "_varlen_attn",
    "auto, many images": "flex_attention",
    "flash_attn": "flash_attn_varlen",
    "block, grouped heads": "flex_attention",
}
NUM_VISUAL, WIDTH, BLOCK = 576, 4096, 128


def runs(trace: Trace) -> Counter[tuple[str, int]]:
    """How often attention ran in the language model, by kernel and FLOPs."""
    return Counter(
        (event.name, event.flops)
        for event in trace.events
        if "att" in event.name and not event.source.startswith("model/hf/") and event.kind == "kernel"
    )


def segment_pairs(load: Load) -> int:
    """Pairs of a query and a key in the segments of a sample: before the images, between two (one token), behind."""
    n, m, before = load.num_text, load.num_images, load.num_text // 4
    between = sum(i * NUM_VISUAL + before + i for i in range(1, m))
    return before**2 + between + (n - before - m + 1) * (m * NUM_VISUAL + n)


def block_pairs(load: Load) -> int:
    """Pairs in all blocks of 128 x 128 in which some text token sees some key, of a pack; by a dense mask."""
    num_text, num_visual = load.num_samples * load.num_text, load.num_samples * load.num_images * NUM_VISUAL
    mask = np.zeros((-(-num_text // BLOCK) * BLOCK, -(-(num_visual + num_text) // BLOCK) * BLOCK), dtype=bool)
    for sample in range(load.num_samples):
        for token in range(load.num_text):
            images = min(max(token - load.num_text // 4 + 1, 0), load.num_images)
            row, first = sample * load.num_text + token, sample * load.num_images * NUM_VISUAL
            mask[row, first : first + images * NUM_VISUAL] = True
            mask[row, num_visual + sample * load.num_text : num_visual + row + 1] = True
    blocks = mask.reshape(len(mask) // BLOCK, BLOCK, -1, BLOCK).any(axis=(1, 3))
    return int(blocks.sum()) * BLOCK**2


@pytest.mark.parametrize("name", CASES)
def test_attention_runs_once_a_layer_and_pass_and_multiplies_what_its_kernel_visits(traces, name):
    """Two products forward, five backward (scores again, and the gradients of values, weights, queries and keys)."""
    kernel, load = KERNELS[name], CASES[name].load
    pairs = block_pairs(load) if kernel == "flex_attention" else load.num_samples * segment_pairs(load)
    width = WIDTH // (2 if "grouped" in name else 1)  # of this process's heads
    forward, backward = (2 * num_products * pairs * width for num_products in (2, 5))
    assert runs(traces[name]) == {(kernel, forward): 2, (f"{kernel}_backward", backward): 2}


@pytest.mark.parametrize("name", ["auto, many images", "flash_attn"])
def test_block_attention_gathers_no_keys(traces, name):
    """A flash kernel wants the images' keys again for each segment behind them."""
    gathers = [event for event in traces[name].events if event.source.startswith("model/varlen_attention.py")]
    assert bool(gathers) == (name == "flash_attn")


def test_a_block_mask_is_made_on_the_host_and_waits_for_nothing(traces):
    trace = traces["auto, many images"]
    made = [event for event in trace.events if event.source.startswith("model/block_attention.py")]
    assert {(event.kind, event.name) for event in made} == {("copy", "host to device"), ("kernel", "flex_attention")}
    assert sum(event.kind == "wait" for event in trace.events) == 1
