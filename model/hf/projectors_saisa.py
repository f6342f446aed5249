"""Projectors: from the encoder's features Z [N, P, C] to visual tokens [N, P, D], of a resampler [N, R, D].

Dims: N images, P features an image, R visual tokens an image, C vision width, D hidden, A heads, H head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from .configuration_saisa import SaisaConfig

HEAD_DIM = 64  # as CLIP's and SigLIP's


class Resampler(nn.Module):
    """Learned latents gather from the features of one image what they need, in one cross-attention:

        Q     = LN(latents) W_Q
        K, U  = LN(Z) W_K, LN(Z) W_V
        x     = LN(latents + Attention(Q, K, U) W_O)

    The layer norms have no weights, which would only multiply those of the linear layers behind them.

    Source: Qwen-VL (arXiv 2308.12966, section 2.1), without its position codes: features know where they stand.
    """

    def __init__(self, width: int, num_tokens: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_heads = next(count for count in range(max(width // HEAD_DIM, 1), 0, -1) if width % count == 0)
        self.latents = nn.Parameter(torch.empty(num_tokens, width, dtype=dtype))
        self.query = nn.Linear(width, width, dtype=dtype)
        self.key = nn.Linear(width, width, bias=False, dtype=dtype)  # one would add the same to all scores of a latent
        self.value = nn.Linear(width, width, dtype=dtype)
        self.output = nn.Linear(width, width, dtype=dtype)

    def forward(self, features_NPC: Tensor) -> Tensor:
        """Returns [N, R, C]."""
        width = features_NPC.shape[-1:]
        features_NPC = layer_norm(features_NPC, width)
        query_ARH = self._heads(self.query(layer_norm(self.latents, width)))
        key_NAPH, value_NAPH = self._heads(self.key(features_NPC)), self._heads(self.value(features_NPC))
        query_NARH = query_ARH.expand(len(features_NPC), -1, -1, -1)
        attended_NARH = scaled_dot_product_attention(query_NARH, key_NAPH, value_NAPH)
        return layer_norm(self.latents + self.output(attended_NARH.transpose(1, 2).flatten(2)), width)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def build_projector(config: SaisaConfig) -> nn.Module:
    """Returns a projector, of which every layer of `saisa` has one."""
    width, hidden = config.vision_config.hidden_size, config.hidden_size
    if config.projector_type == "linear":
        return nn.Linear(width, hidden)
    if config.projector_type == "resampler":
        return nn.Sequential(Resampler(width, config.resampler_tokens), nn.Linear(width, hidden))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
