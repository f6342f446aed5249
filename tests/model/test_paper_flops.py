"""The formulas give the numbers of the paper, which are written here by hand."""

from dataclasses import replace

import pytest

from model.paper_flops import PaperSizes, llama_3_2_flops, llava_flops, open_flamingo_flops, saisa_flops

VICUNA = PaperSizes(n=32, h=4096, m=11008, k=4096, d=1024, k_text=4096)
GROUPED = replace(VICUNA, m=14336, k=1024, k_text=1024)  # Mistral-7B and Llama-3-8B
TEXT = 64


def tflops(flops: int) -> str:
    return f"{flops / 1e12:.2f}"


@pytest.mark.parametrize(
    ("num_visual", "llava", "saisa"), [(576, "8.53", "2.86"), (729, "10.63", "3.40"), (1024, "14.76", "4.44")]
)
def test_vicuna_with_each_encoder(num_visual, llava, saisa):
    """With 1,024 for the width of all three encoders."""
    assert tflops(llava_flops(VICUNA, num_visual, TEXT)) == llava
    assert tflops(saisa_flops(VICUNA, num_visual, TEXT)) == saisa


def test_models_whose_query_heads_share_keys():
    assert tflops(llava_flops(GROUPED, 576, TEXT)) == "9.17"
    assert tflops(saisa_flops(GROUPED, 576, TEXT)) == "2.00"
    assert tflops(saisa_flops(replace(GROUPED, k_text=4096), 576, TEXT)) == "2.10"


def test_cross_attention_is_cheaper_than_saisa_and_its_llm_is_the_text_only_one():
    """6.48e9 parameters of layers, twice a text token, and 64 x 64 attention; then 8 blocks by hand."""
    text_only = 2 * TEXT * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32 * 2 * 2 * TEXT * TEXT * 4096
    block = 2 * TEXT * (2 * 4096 * 512 + 2 * 4096 * 16384) + 2 * 64 * 1024 * 1024 + 2 * 2 * TEXT * 64 * 512
    resampler = 2 * 640 * 1024 * 1024 + 2 * 64 * 2 * 1024 * 512 + 2 * 2 * 64 * 640 * 512 + 2 * 64 * 2 * 1024 * 4096
    assert open_flamingo_flops(VICUNA, 576, TEXT) == text_only + 8 * block + 6 * resampler
    block = 2 * TEXT * (2 * 4096**2 + 3 * 4096 * 11008) + 2 * 576 * 1024 * 2 * 4096 + 2 * 2 * TEXT * 576 * 4096
    assert llama_3_2_flops(VICUNA, 576, TEXT) == text_only + 8 * block
    assert 0.95e12 < open_flamingo_flops(VICUNA, 576, TEXT) < llama_3_2_flops(VICUNA, 576, TEXT) < 1.1e12
