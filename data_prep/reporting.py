"""What a sharding run tells its user: progress, one line for each kind of problem, and what was done."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from common.console import build_progress, count_text
from data_prep.image_check import is_left_as_bytes
from data_prep.plan import Plan
from data_prep.records import DUPLICATE, Reject


class TooManyRefused(ValueError):
    """More rows were refused than the user allows."""


@dataclass
class RejectLog:
    """The refused rows so far: one line on the console for each kind of problem, and an end when there are too many."""

    source: str
    num_rows: int
    max_bad_fraction: float
    console: Console
    place: Callable[[int], str] = "index {}".format
    rejects: list[Reject] = field(default_factory=list)

    def add(self, rejects: Iterable[Reject]) -> None:
        """Adds refused rows.

        Raises:
            TooManyRefused: Their fraction is above the limit.
        """
        known = {reject.kind for reject in self.rejects}
        for reject in rejects:
            self.rejects.append(reject)
            if reject.kind not in known:
                known.add(reject.kind)
                self.console.print(f"refused ({reject.kind}): {self.describe(reject)}")
        num_bad = sum(reject.kind != DUPLICATE for reject in self.rejects)
        if num_bad > self.max_bad_fraction * self.num_rows:
            raise TooManyRefused(
                f"{num_bad:,} of {count_text(self.num_rows, 'row')} of {self.source} refused, more than "
                f"--max-bad-fraction {self.max_bad_fraction:g} allows; the table above says why, and rejects.jsonl of "
                "each row, which a dry run does not write"
            )

    def describe(self, reject: Reject) -> str:
        """Returns one line that names the row and what is wrong with it."""
        file = f" ({reject.file})" if reject.file else ""
        return f"{self.source} record {reject.id} ({self.place(reject.index)}): {reject.reason}{file}"

    def show_table(self) -> None:
        """Prints the reasons and how often each was met, if any was."""
        table = Table("refused because", "rows", "for example")
        first = {reject.kind: self.describe(reject) for reject in sorted(self.rejects, reverse=True)}
        for kind, count in Counter(reject.kind for reject in self.rejects).most_common():
            table.add_row(kind, f"{count:,}", first[kind])
        if self.rejects:
            self.console.print(table)


def build_task_progress(console: Console) -> Progress:
    """Returns a progress display whose tasks carry a `note`: what a count or a rate is worth saying."""
    columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", "{task.fields[note]}")
    return build_progress(console, *columns, TimeRemainingColumn())


@dataclass(frozen=True)
class Work:
    """What a progress display says of tasks, one a shard: `total` counts what `num_done` counts of their results."""

    verb: str
    total: int
    num_shards: int
    num_done: Callable[[Any], int]
    unit: str = "samples/s"
    unit_size: float = 1


def run_shown[Task, Result](
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    work: Work,
    console: Console,
    workers: int | None,
    address: str | None = None,
) -> Generator[Result]:
    """Yields what the function returns for each task on Ray, as they finish, showing rate and time left."""
    from data_prep.runner import ray_session, run_tasks  # Ray takes a second: not before there is work

    num_done, started = 0, time.monotonic()
    with ray_session(address, workers) as in_flight, build_task_progress(console) as progress:
        bar = progress.add_task(work.verb, total=work.total, note="")
        for number, result in enumerate(run_tasks(function, tasks, in_flight), start=1):
            num_done += work.num_done(result)
            rate = num_done / work.unit_size / (time.monotonic() - started)
            note = f"{number:,} of {count_text(work.num_shards, 'shard')}, {rate:,.0f} {work.unit}"
            progress.update(bar, completed=num_done, note=note)
            yield result


def plan_text(num_rows: int, plan: Plan, num_bytes: int) -> str:
    """Returns what a run would write, before an image has been read."""
    return (
        f"{count_text(num_rows, 'row')}: {len(plan.order):,} to write and "
        f"{num_rows - len(plan.order):,} refused so far\n"
        f"about {num_bytes / 1e6:,.1f} MB in {count_text(len(plan.shards), 'shard')}; nothing was written"
    )


def notes_text(notes: dict[str, tuple[int, str]], formats: Counter) -> str:
    """Returns a line for each thing worth knowing of the rows and images that were written."""
    lines = []
    for note, (count, example) in notes.items():
        noun, _, rest = note.partition(" ")
        lines.append(f"{count_text(count, noun)} {rest}, such as {example}")
    for name, count in sorted(formats.items()):
        if is_left_as_bytes(name):
            lines.append(
                f"{count_text(count, 'image')} in the format {name}, which webdataset's own decoder leaves as bytes"
            )
    return "\n".join(lines)


def summary_text(manifest: dict, num_kept: int, seconds: float, out: object) -> str:
    """Returns the closing words of a run; `num_kept` shards were there before it."""
    kept = f" ({num_kept:,} there already and verified)" if num_kept else ""
    return (
        f"{count_text(manifest['num_rows'], 'row')} = {count_text(manifest['num_samples'], 'sample')} + "
        f"{manifest['num_rejected']:,} refused\n"
        f"{count_text(manifest['num_images'], 'image')}, {manifest['num_bytes'] / 1e6:,.1f} MB in "
        f"{count_text(manifest['num_shards'], 'shard')}{kept}\n"
        f"{seconds:,.1f} s, {manifest['num_rows'] / seconds:,.0f} rows/s; fingerprint {manifest['fingerprint'][:16]}\n"
        f"written to {out}"
    )
