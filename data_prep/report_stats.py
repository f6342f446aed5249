"""What a report counts: pure functions from records to counters, and from counters to percentiles and histograms.

Statistics are a counter of values for each name, so those of a shard are small, and those of many shards add up in any
order to exactly what one pass over all samples would count:

    {"answer_words": {1: 30, 2: 3}, "format": {"PNG": 10, "GIF": 8}, "source_samples": {"coco": 27, "(no image)": 3}}
"""

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from common.tokens import IMAGE_TOKEN

type Value = int | float | str
type Stats = dict[str, Counter]

NO_IMAGE, NO_FOLDER = "(no image)", "(no folder)"
PERCENTS = (1, 50, 95, 99, 100)
TAIL_PERCENT = 99
"""Values above this percentile share the last bar, so that one odd value does not flatten the rest."""
MAX_BARS = 40
MAX_LABELS = 7


def measure(record: dict, num_bytes: int) -> Iterator[tuple[str, Value]]:
    """Yields the name and value of everything that is counted of one sample.

    Args:
        record: As shards hold it.
        num_bytes: What the sample takes in its tar, images included.
    """
    turns, images = record["conversations"], record["images"]
    yield "sample_kb", round(num_bytes / 1000)
    yield "rounds", sum(turn["from"] == "human" for turn in turns)
    yield "conversation_characters", sum(len(_said(turn)) for turn in turns)
    for turn in turns:
        if turn["from"] != "system":
            yield "answer_words" if turn["from"] == "gpt" else "question_words", len(_said(turn).split())
    yield "num_images", len(images)
    sources = [_source(image["path"]) for image in images]
    yield from (("source_samples", source) for source in dict.fromkeys(sources or [NO_IMAGE]))
    for image, source in zip(images, sources, strict=True):
        width, height = image["width"], image["height"]
        yield "source_images", source
        yield "format", image["format"]
        yield "longest_side", max(width, height)
        yield "shortest_side", min(width, height)
        yield "aspect_ratio", round(width / height, 2)
        if "source_width" in image:
            yield "shrunk", 1


def _said(turn: dict) -> str:
    return turn["value"].replace(IMAGE_TOKEN, "").strip()


def _source(path: str) -> str:
    first, *others = PurePosixPath(path).parts
    return first if others else NO_FOLDER


def count(stats: Stats, measures: Iterable[tuple[str, Value]]) -> None:
    """Counts measured values."""
    for name, value in measures:
        stats.setdefault(name, Counter())[value] += 1


def merge(into: Stats, stats: Stats) -> None:
    """Adds the counters of some samples to those of others."""
    for name, counts in stats.items():
        into.setdefault(name, Counter()).update(counts)


def percentile(counts: Counter, percent: int) -> float:
    """Returns the least value that `percent` of the values do not exceed (the nearest rank); 100 is the maximum."""
    values = sorted(counts)
    rank = max(1, -(-percent * counts.total() // 100))
    return values[bisect_left(list(itertools.accumulate(counts[value] for value in values)), rank)]


class Bar(NamedTuple):
    """A bar of a histogram: `title` says which values it counts, `label` what stands under it, if anything."""

    num_values: int
    title: str
    label: str
    is_tail: bool = False


def bars(counts: Counter, unit: float = 1) -> list[Bar]:
    """Returns the bars of a histogram, at most `MAX_BARS` of one width and one more for the tail.

    Args:
        counts: How often each number occurs; at least one does.
        unit: What all numbers are multiples of.
    """
    low, high = min(counts), percentile(counts, TAIL_PERCENT)
    step = next(step for step in _steps(unit) if _bin(high, step) - _bin(low, step) < MAX_BARS)
    first, tail = _bin(low, step), _bin(high, step) + 1
    binned = Counter()
    for value, num_values in counts.items():
        binned[min(_bin(value, step), tail)] += num_values
    every = math.ceil((tail - first) / MAX_LABELS)
    found = []
    for number in range(first, tail):
        start, end = shown(number * step), shown((number + 1) * step - unit)
        has_label = (number - first) % every == 0 and not (binned[tail] and tail - number < every)
        found.append(Bar(binned[number], start if step == unit else f"{start} to {end}", start if has_label else ""))
    if binned[tail]:
        found.append(Bar(binned[tail], f"{shown(tail * step)} or more", "more", is_tail=True))
    return found


def _steps(unit: float) -> Iterator[float]:
    return (unit * digit * 10**power for power in itertools.count() for digit in (1, 2, 5))


def _bin(value: float, step: float) -> int:
    return math.floor(value / step + 1e-9)  # 0.3 / 0.1 is a little less than 3


def shown(value: float) -> str:
    """Returns a number as people read it: 1,234 or 0.75."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def ranked(counts: Counter) -> list[tuple[str, int]]:
    """Returns names and their counts, most frequent first, equal ones by name: whatever order they were counted in."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
