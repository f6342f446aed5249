"""Inside a global batch: samples to data-parallel ranks, a rank's samples into packs. Functions of the sizes alone.

Samples are dealt one by one so that the predicted FLOPs of the ranks, not their token counts, are even; whole packs
would be too coarse for that. Each rank then packs what it got under a text-token and an image budget. A pack is a
micro-batch.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class SampleSize(NamedTuple):
    """What a sample takes: text tokens and images."""

    num_text: int
    num_images: int


def deal_samples(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Returns each rank's samples: the costliest that is left goes to the rank with the least work so far.

    Ranks may get different numbers of samples, or none. Source: longest processing time first (Graham, 1969).
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0.0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        work, rank = heapq.heappop(load)
        ranks[rank].append(i)
        heapq.heappush(load, (work + costs[i], rank))
    return ranks


def imbalance(ranks: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    """Returns by which fraction the busiest rank has more work than the average one: time the others wait."""
    work = [sum(costs[i] for i in rank) for rank in ranks]
    return max(work) * len(work) / sum(work) - 1 if sum(work) else 0.0


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


def padded_rows(num_rows: int, multiple: int) -> int:
    """Returns the next multiple of `multiple` that is at least `num_rows`, and at least one multiple."""
    return max(1, -(-num_rows // multiple)) * multiple
