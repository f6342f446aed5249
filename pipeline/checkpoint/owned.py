"""What each process writes and reads by itself: the ranges of the parameters that it updates, as parts of whole ones.

Megatron-core's distributed optimizer lays parameters one after another in a buffer and gives each data-parallel rank
one part of that. A range of a flattened parameter is no rectangle, which is all that torch's checkpoints know; but it
is some, at most three of a matrix. Elements 3 to 16 of [4, 5], marked o:

    . . . o o       the end of a row
    o o o o o       whole rows
    o o o o o
    o o . . .       the beginning of a row

So every process writes its own rectangles under the names and in the sizes of whole parameters, gathers nothing, and
reads whatever rectangles it owns, however the model and the optimizer were divided when they were written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from pipeline.optimizer import OwnedRange, owned_ranges

type Whole = ShardedTensor | ShardedTensorFactory
"""Where a parameter of this process lies in the whole model; several places of an FFN's fused up and gate."""


def owned_state(optimizer: MegatronOptimizer, trained: Sequence[Whole], with_weights: bool) -> dict[str, ShardedTensor]:
    """Returns the rectangles that this process owns of fp32 weights, moments and, if asked for, the model's weights.

    Their data are views of what the optimizer and the model have, so that what is loaded into them is in place.
    """
    described: dict[Any, Whole] = {entry.data: entry for entry in trained}
    found = [
        rectangle
        for owned in owned_ranges(optimizer)
        for key, flat in _named(owned, described[owned.parameter].key, with_weights)
        for rectangle in _cut(described[owned.parameter], key, flat, owned.start)
    ]
    return {str(number): rectangle for number, rectangle in enumerate(found)}


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields offsets and sizes of the rectangles that elements [start, stop) of a row-major tensor are, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all within one row
        yield from _within_row(last, start, stop, shape)
        return
    yield from _within_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within_row(last, last * row, stop, shape)


def _within_row(
    row: int, start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    before = row * prod(shape[1:])
    for offsets, sizes in rectangles(start - before, stop - before, shape[1:]):
        yield (row, *offsets), (1, *sizes)


def _named(owned: OwnedRange, name: str, with_weights: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the flat tensors of a range under the names that megatron-core's `fully_reshardable` form has for them."""
    for kind, flat in owned.states.items():
        yield f"optimizer.state.{kind}.{name}", flat
    if with_weights:
        yield name, owned.weight


def _cut(whole: Whole, key: str, flat: Tensor, start: int) -> Iterator[ShardedTensor]:
    """Yields a flat range that begins at element `start` of a parameter as rectangles of the whole model's."""
    parameter: Any = whole.data
    outline = torch.empty(parameter.shape, dtype=flat.dtype, device="meta")
    pieces: Any = (
        whole.build_fn(key, outline, whole.replica_id, None)
        if isinstance(whole, ShardedTensorFactory)
        else [replace(whole, key=key, data=outline, dtype=flat.dtype)]
    )
    for piece in pieces:
        assert piece.data.is_contiguous() and not piece.prepend_axis_num
        before = piece.data.storage_offset()
        begin = max(start, before)
        stop = min(start + flat.numel(), before + piece.data.numel())
        for offsets, sizes in rectangles(begin - before, stop - before, piece.local_shape):
            end = begin + prod(sizes)
            yield ShardedTensor(
                key=key,
                data=flat[begin - start : end - start].view(sizes),
                dtype=flat.dtype,
                local_shape=sizes,
                global_shape=piece.global_shape,
                global_offset=tuple(a + b for a, b in zip(piece.global_offset, offsets, strict=True)),
                axis_fragmentations=None,
                replica_id=(*piece.replica_id[:2], 0),  # the data-parallel ranks have different ranges
            )
            begin = end
