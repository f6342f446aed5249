"""FLOPs of the blocks that `flamingo` adds to a language model, forward; see `model.flops`. None for others."""

import numpy as np

from model.config import ModelConfig
from model.hf.family_saisa import FFN_WIDTHS, HEAD_DIM, NUM_HEADS


def block_flops[Count: (int, np.ndarray)](model: ModelConfig, num_text: Count, num_visual: Count) -> Count:
    """Returns the FLOPs of a forward pass of one block. Source: the shapes in `model.flamingo`."""
    d, inner = model.hidden_size, NUM_HEADS * HEAD_DIM
    if model.cross_attention == "open_flamingo":
        queries, keys_values, width, ffn = inner, 2 * inner, model.vision.hidden_size, 2 * d * FFN_WIDTHS * d
    else:
        queries, keys_values = model.num_attention_heads * model.head_dim, 2 * model.num_query_groups * model.head_dim
        width, ffn = d, 3 * d * model.ffn_hidden_size
    linear = num_text * (2 * d * queries + ffn) + num_visual * width * keys_values
    return 2 * (linear + 2 * num_text * num_visual * queries)


def blocks_flops[Count: (int, np.ndarray)](model: ModelConfig, num_text: Count, num_visual: Count) -> Count:
    """Returns the FLOPs of a forward pass of all blocks."""
    num_blocks = sum(kind.shown == "block" for kind in model.layers)
    return num_blocks * block_flops(model, num_text, num_visual)
