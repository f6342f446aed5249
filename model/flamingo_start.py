"""How the new weights of `flamingo` start; what counts them does so without torch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import ModelConfig
from model.flamingo_weights import new_weights


def random_blocks(model: ModelConfig, seed: int, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the wanted weights of new blocks, the same on every machine and at any parallelism.

    Source: `torch.nn.Linear`'s own initialisation; gates of zero leave the language model as it is.
    """
    for number, weight in enumerate(new_weights(model)):
        if weight.ours in wanted:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * (number + 1))
            empty = torch.empty(weight.shape)
            if weight.start == "linear":
                bound = 1 / math.sqrt(weight.shape[-1])
                yield weight.ours, empty.uniform_(-bound, bound, generator=generator)
            else:
                yield weight.ours, empty.fill_(float(weight.start == "ones"))
