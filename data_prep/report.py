"""Look at the data: `python -m data_prep.report OUT` writes one HTML page about a finished shard directory.

    count    one Ray task a shard: every record, no image but those to show     runner, report_shard, report_stats
    show     counts, sources, lengths, sizes, refusals, random samples          report.html.jinja

The page needs no other file and no network, and runs no script. Texts of a data set are hostile input: the template
escapes all of them, and its Content-Security-Policy would stop what slipped through.
"""

import os
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from common.console import UsageError, build_console, count_text, run
from common.files import Location, open_file, open_location, write_whole
from common.pages import render_page
from data_prep.image_check import is_left_as_bytes
from data_prep.listings import AGAIN, Entry, Manifest, ShardEntry, read_manifest
from data_prep.report_shard import Card, read_shard
from data_prep.report_stats import NO_FOLDER, PERCENTS, Stats, bars, merge, percentile, ranked, shown
from data_prep.reporting import Work, run_shown
from data_prep.sidecars import ReadTask

HISTOGRAMS: tuple[tuple[str, str, str, float], ...] = (
    ("answer_words", "Answers", "words in a gpt turn", 1),
    ("question_words", "Questions", "words in a human turn", 1),
    ("rounds", "Conversations", "rounds of question and answer", 1),
    ("conversation_characters", "Text", "characters in a conversation", 1),
    ("num_images", "Images per sample", "images", 1),
    ("sample_kb", "Samples", "kB in the tar, images included", 1),
    ("longest_side", "Longest side", "pixels of an image", 1),
    ("shortest_side", "Shortest side", "pixels of an image", 1),
    ("aspect_ratio", "Aspect ratio", "width / height of an image", 0.01),
)
"""Name of the statistic, title, what a value counts, and what all values are multiples of."""
MAX_SOURCES = 40


class RejectLine(Entry):
    """A line of rejects.jsonl."""

    index: int
    id: str
    file: str | None
    kind: str
    reason: str


def main(
    out: Annotated[str, typer.Argument(help="a finished shard directory: a folder or a URL")],
    html: Annotated[Path | None, typer.Option(help="the page; default: report.html in OUT, here for a URL")] = None,
    num_samples: Annotated[int, typer.Option(help="random samples to show")] = 48,
    seed: Annotated[int, typer.Option(help="another seed, other samples")] = 0,
    workers: Annotated[int | None, typer.Option(help="shards at a time; default: every CPU")] = None,
) -> None:
    """Write one HTML page that shows what is in a shard directory."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    if num_samples < 0:
        raise UsageError(f"--num-samples {num_samples} must not be negative")
    folder = open_location(out)
    manifest = read_manifest(folder)
    page = html or (folder if isinstance(folder, Path) else Path()) / "report.html"
    if not os.access(page.parent, os.W_OK):
        raise UsageError(f"{page.parent} is no folder to write to; name a file with --html")
    write_report(folder, manifest, page, num_samples, seed, workers)


def write_report(
    folder: Location, manifest: Manifest, page: Path, num_samples: int = 48, seed: int = 0, workers: int | None = None
) -> None:
    """Writes the page about a finished shard directory: the same one whatever the number of workers."""
    console = build_console(stderr=True)
    tasks = build_tasks(folder, manifest.shards, num_samples, seed)
    stats, cards = read_shards(tasks, manifest.num_samples, console, workers)
    text = render(folder, manifest, stats, cards, count_rejects(folder))
    write_whole(page, text.encode())
    console.print(
        f"{count_text(manifest.num_samples, 'sample')} looked at, {len(cards):,} shown\n"
        f"written to {page} ({size_text(page.stat().st_size)}); open it in a browser",
    )


def build_tasks(folder: Location, shards: Sequence[ShardEntry], num_samples: int, seed: int) -> list[ReadTask]:
    """Returns a task for each shard; the samples to show are drawn from all samples alike."""
    ends = list(accumulate(shard.num_samples for shard in shards))
    total = ends[-1]
    chosen: dict[int, list[int]] = {}
    for number in random.Random(seed).sample(range(total), min(num_samples, total)):
        shard = bisect_right(ends, number)
        chosen.setdefault(shard, []).append(number - ends[shard] + shards[shard].num_samples)
    return [ReadTask(folder, shard, tuple(chosen.get(number, ()))) for number, shard in enumerate(shards)]


def read_shards(
    tasks: Sequence[ReadTask], num_samples: int, console: Console, workers: int | None
) -> tuple[Stats, list[Card]]:
    """Returns the statistics of all shards and the samples to show in the order of their keys, showing progress."""
    stats, cards = {}, []
    work = Work("read ", num_samples, len(tasks), lambda report: report.num_samples)
    for report in run_shown(read_shard, tasks, work, console, workers):
        merge(stats, report.stats)
        cards += report.cards
    return stats, sorted(cards, key=lambda card: card.key)


def count_rejects(folder: Location) -> list[tuple[str, int, RejectLine]]:
    """Returns each kind of refusal with its number of rows and its first row, most frequent kind first."""
    counts, first, file = Counter(), {}, folder / "rejects.jsonl"
    with open_file(file) as lines:
        for line in lines:
            try:
                reject = RejectLine.model_validate_json(line)
            except ValidationError:
                raise ValueError(f"{file} is damaged ({line[:40]!a}); delete it and {AGAIN}") from None
            counts[reject.kind] += 1
            first.setdefault(reject.kind, reject)
    return [(kind, num_rows, first[kind]) for kind, num_rows in ranked(counts)]


def render(
    folder: Location,
    manifest: Manifest,
    stats: Stats,
    cards: Sequence[Card],
    rejects: Sequence[tuple[str, int, RejectLine]],
) -> str:
    """Returns the page."""
    seconds = (folder / "manifest.json").stat().st_mtime  # 0 where a store does not tell
    sources = source_rows(stats, manifest.sources.images.names)
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        {"shown": shown, "size": size_text, "percent_of": percent_text},
        name=folder.name,
        manifest=manifest,
        dated=f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if seconds else "unknown date",
        num_text_only=stats["num_images"][0],
        num_multi=sum(seen for images, seen in stats["num_images"].items() if images > 1),
        num_shrunk=stats.get("shrunk", Counter()).total(),
        sources=sources[:MAX_SOURCES],
        num_more_sources=len(sources[MAX_SOURCES:]),
        formats=[(*each, is_left_as_bytes(each[0])) for each in ranked(stats.get("format", Counter()))],
        charts=[chart(stats[name], title, meaning, unit) for name, title, meaning, unit in HISTOGRAMS if name in stats],
        rejects=rejects,
        cards=cards,
    )


def source_rows(stats: Stats, roots: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns (source, samples, images) of each source; images without a folder are called after their root."""
    images = stats.get("source_images", Counter())
    only_files = images.keys() <= {NO_FOLDER}
    name_of = {NO_FOLDER: f"{', '.join(roots)} (no folders)"} if only_files else {}
    return [(name_of.get(name, name), seen, images[name]) for name, seen in ranked(stats["source_samples"])]


def chart(counts: Counter, title: str, meaning: str, unit: float) -> dict[str, Any]:
    """Returns what the template draws a histogram from."""
    found = bars(counts, unit)
    return {
        "title": title,
        "meaning": meaning,
        "num_values": counts.total(),
        "bars": found,
        "peak": max(bar.num_values for bar in found),
        "percentiles": [(f"p{p}" if p < 100 else "max", percentile(counts, p)) for p in PERCENTS],
    }


def size_text(num_bytes: int) -> str:
    """Returns a number of bytes as people read it, in powers of 1,000."""
    power = next(power for power in (1, 2, 3, 4) if num_bytes < 1000 ** (power + 1) or power == 4)
    return f"{num_bytes / 1000**power:,.1f} {' kMGT'[power]}B"


def percent_text(part: int, whole: int) -> str:
    """Returns which part of the whole it is; what is there is never said to be nothing."""
    percent = 100 * part / whole if whole else 0
    return "<0.1%" if 0 < percent < 0.1 else f"{percent:.1f}%"


if __name__ == "__main__":
    run(main)
