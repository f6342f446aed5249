"""Inside a global batch: samples into packs, packs to data-parallel ranks. Pure functions of the sizes alone.

A pack is a micro-batch. Packs are filled under a text-token and an image budget, then dealt so that the predicted
FLOPs of the ranks, not their token counts, are even.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class SampleSize(NamedTuple):
    """What a sample takes: text tokens and images."""

    num_text: int
    num_images: int


def pack_samples(sizes: Sequence[SampleSize], max_text: int, max_images: int) -> list[list[int]]:
    """Returns packs of sample numbers: first fit, longest text first.

    A sample that alone exceeds a budget (a row with more images than a pack may hold) gets a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n].num_text, n)):
        text, images = sizes[number]
        for i, (free_text, free_images) in enumerate(room):
            if text <= free_text and images <= free_images:
                packs[i].append(number)
                room[i] = (free_text - text, free_images - images)
                break
        else:
            packs.append([number])
            room.append((max_text - text, max_images - images))
    return packs


def deal(packs: list[list[int]], num_ranks: int, cost: Callable[[int], float]) -> list[list[list[int]]]:
    """Returns each rank's packs: the costliest pack left goes to the rank with the least work so far.

    `cost` gives the predicted FLOPs of a sample. Ranks may get different numbers of packs, or none.
    """
    costs = [sum(map(cost, pack)) for pack in packs]
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [(0.0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(packs)), key=lambda i: (-costs[i], i)):
        work, rank = heapq.heappop(load)
        ranks[rank].append(packs[i])
        heapq.heappush(load, (work + costs[i], rank))
    return ranks
