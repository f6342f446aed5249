"""The scales that FP8's delayed recipe remembers, as they stand in a checkpoint: looked at before they are taken up."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from common.pickles import read_pickle

FP8_STATE = "_extra_state"  # what Transformer Engine calls it in a state dict
RECIPE_CLASSES = [  # in their pickles; megatron-core's is what its layers are run with
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    *(
        ("transformer_engine.common.recipe", name)
        for name in ("DelayedScaling", "Format", "_FormatHelper", "MMParams", "QParams")
    ),
]
LOADERS = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
"""What a pickled tensor's bytes are read with; megatron-core puts its own in the place of torch's."""


def has_fp8_state(config: TransformerConfig) -> bool:
    """Whether layers remember scales from step to step, as those of FP8's delayed recipe do."""
    return config.fp8 is not None and config.fp8_recipe == "delayed"


@contextmanager
def fp8_state_checked(state: dict[str, Any]) -> Iterator[None]:
    """Lets Transformer Engine take up the scales in a state dict, after a look at what they name.

    It keeps those of the delayed recipe as a pickle in a tensor of bytes, and refuses to read it unless a variable is
    set. Here that is set once nothing in the pickle is more than tensors, plain values and a recipe.

    Raises:
        ValueError: Something is.
    """
    for name, value in state.items():
        if name.endswith(FP8_STATE):
            try:
                _check_fp8_state(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_fp8_state(value: Any) -> None:
    """Refuses a pickle that names anything but what Transformer Engine stores.

    Source: Transformer Engine 2.x, `TransformerEngineBaseModule.get_extra_state`: `pickle.dumps` of tensors by name,
    of numbers and texts, and of the recipe, in a uint8 tensor; nothing in an empty one. Version 1 had `torch.save`.
    """
    if isinstance(value, BytesIO):
        torch.load(BytesIO(value.getvalue()), weights_only=True)
    elif isinstance(value, Tensor) and value.dtype == torch.uint8:
        if value.numel():
            read_pickle(BytesIO(value.detach().cpu().numpy().tobytes()), _fp8_state_globals())
    elif value is not None:
        raise ValueError(f"a {type(value).__name__}, not scales of Transformer Engine")


def _fp8_state_globals() -> dict[tuple[str, str], Any]:
    """Returns stand-ins for the recipe's classes, which need no Transformer Engine, and torch's own for tensors."""
    known: dict[tuple[str, str], Any] = dict.fromkeys(RECIPE_CLASSES, _Recipe)
    known |= {(module, name): _load_data for module, name in LOADERS}
    known |= {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2}
    return known | {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _load_data(data: bytes) -> Any:
    return torch.load(BytesIO(data), weights_only=True)


class _Recipe:
    """Takes whatever a recipe is built with."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...
