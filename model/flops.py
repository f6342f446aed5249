"""What a SAISA step costs, from the sizes alone."""

import numpy as np

from model.config import ModelConfig


def forward_flops[Count: (int, np.ndarray)](model: ModelConfig, num_text: Count, num_visual: Count) -> Count:
    """Returns the FLOPs of one sample's forward pass, or of each sample's for arrays.

    A multiply and an add count as two, norms and softmax as none.
    Visual tokens pay for the projector and for keys and values; queries, attention output and the FFN are text only
    (arXiv 2502.02458, appendix A.2). Attention is counted for full rectangles, as the paper does.
    """
    d, c = model.hidden_size, model.vision.hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys_values = 2 * model.num_query_groups * model.head_dim
    projector = c * d + (d * d if model.projector == "mlp" else 0)
    visual = num_visual * (projector + d * keys_values)
    text = num_text * (2 * d * queries + d * keys_values + 3 * d * model.ffn_hidden_size)
    attention = 2 * num_text * (num_text + num_visual) * queries
    head = num_text * d * model.vocab_size
    return 2 * (model.num_layers * (visual + text + attention) + head)
