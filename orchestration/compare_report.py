"""The page of `make compare`: a table, two plots, and what they say of the paper's claims.

Runs of one seed start from the same base and see the same batches, so differences are taken seed by seed. One is called
so only if Student's t over the seeds says it, at 95%; with one seed none is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from common.console import count_text
from common.files import write_whole
from common.pages import image_url, render_page
from common.plots import COLORS, LEGEND, Panel, drawn

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""What Student's t stays below with 95% if there is no difference, by degrees of freedom; the last from 10 on."""
Summary = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """An architecture in the table.

    Attributes:
        name: of the architecture.
        accuracies: of its runs.
        blind: mean accuracy with blank pictures.
        num_added: parameters added to language model and encoder.
        training_flops: of both stages.
        training_seconds: mean of its runs.
        prefill_flops: of a prompt.
        prefill_seconds: of the same.
    """

    name: str
    accuracies: Sequence[float]
    blind: float
    num_added: int
    training_flops: float
    training_seconds: float
    prefill_flops: int
    prefill_seconds: float

    @property
    def accuracy(self) -> float:
        """Mean of its runs."""
        return mean(self.accuracies)


def rows_of(summary: Summary) -> list[Row]:
    """Returns the table's rows."""
    rows = []
    for name, found in summary.items():
        runs = found["runs"]
        rows.append(
            Row(
                name=name,
                accuracies=[run["accuracy"] for run in runs],
                blind=mean(run["blind_accuracy"] for run in runs),
                num_added=runs[0]["num_added"],
                training_flops=mean(run["training_flops"] for run in runs),
                training_seconds=mean(run["training_seconds"] for run in runs),
                prefill_flops=runs[0]["prefill_flops"],
                prefill_seconds=found["prefill_seconds"],
            )
        )
    return rows


def compared(one: Row, other: Row) -> str:
    """Returns how the accuracies of two architectures compare: `higher`, `lower` or `not different` for the first.

    Source: Student's paired t-test.
    """
    differences = [a - b for a, b in zip(one.accuracies, other.accuracies, strict=True)]
    num_seeds = len(differences)
    if num_seeds < 2:
        return "not different"
    limit = T_95[min(num_seeds - 1, len(T_95)) - 1]
    if abs(mean(differences)) <= limit * stdev(differences) / num_seeds**0.5:
        return "not different"
    return "higher" if mean(differences) > 0 else "lower"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: an architecture's accuracy against another's should be one of `expected`."""

    text: str
    one: str
    other: str
    expected: tuple[str, ...]


AT_LEAST = ("higher", "not different")
CLAIMS = (
    Claim("Attention among visual tokens is not needed (table 1)", "naavit", "llava", AT_LEAST),
    Claim("SAISA is at least as accurate as LLaVA-1.5 (figure 1)", "saisa", "llava", AT_LEAST),
    Claim("Layers that contribute little can leave visual tokens alone (ShortV)", "shortv", "llava", AT_LEAST),
    Claim("MLPs are better projectors than linear layers (table 7)", "saisa", "saisa-linear", ("higher",)),
    Claim("MLPs are better projectors than resamplers (table 7)", "saisa", "saisa-resampler", ("higher",)),
    Claim("One shared MLP is enough for stage 1 (table 6)", "saisa", "saisa-full-stage1", AT_LEAST),
)


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool | None, str]]:
    """Returns (claim, whether it is supported or None where seeds cannot tell, the numbers) for what was run."""
    by_name = {row.name: row for row in rows}
    found = []
    for claim in CLAIMS:
        if claim.one in by_name and claim.other in by_name:
            one, other = by_name[claim.one], by_name[claim.other]
            told = f"{one.name} {one.accuracy:.1%}, {other.name} {other.accuracy:.1%}: "
            if min(len(one.accuracies), len(other.accuracies)) < 2:
                found.append((claim.text, None, told + "one seed says nothing of a difference"))
            else:
                outcome = compared(one, other)
                found.append((claim.text, outcome in claim.expected, f"{told}{one.name} is {outcome}"))
    return found


def costs(rows: Sequence[Row], baseline: str) -> list[tuple[str, str]]:
    """Returns what SAISA costs of the baseline, the paper's number beside it."""
    by_name = {row.name: row for row in rows}
    if "saisa" not in by_name:
        return []
    ours, theirs = by_name["saisa"], by_name[baseline]
    return [
        ("FLOPs to read a prompt", f"{ours.prefill_flops / theirs.prefill_flops:.2f} (the paper, at 7B: 0.34)"),
        ("time to read a prompt", f"{ours.prefill_seconds / theirs.prefill_seconds:.2f}"),
        ("FLOPs to train both stages", f"{ours.training_flops / theirs.training_flops:.2f}"),
        ("time to train both stages", f"{ours.training_seconds / theirs.training_seconds:.2f} (the paper: 0.74)"),
    ]


def write_report(summary: Summary, baseline: str, quick: bool, out: Path, console: Console) -> None:
    """Writes the page and the plots, and prints the table."""
    rows = rows_of(summary)
    draw_accuracies(rows, out / "accuracy.png")
    draw_accuracy_by_flops(rows, out / "flops.png")
    pictures = []
    for file in (out / "accuracy.png", out / "flops.png", out / "runs" / "shortv-0" / "contribution.png"):
        if file.is_file():
            with Image.open(file) as picture:
                pictures.append(image_url(picture))
    template = Path(__file__).with_name("compare.html.jinja")
    num_seeds = count_text(len(rows[0].accuracies), "seed")
    page = render_page(
        template,
        {"spread": spread},
        rows=rows,
        baseline=next(row for row in rows if row.name == baseline),
        verdicts=verdicts(rows),
        costs=costs(rows, baseline),
        pictures=pictures,
        num_seeds=num_seeds,
        quick=quick,
    )
    write_whole(out / "compare.html", page.encode())
    print_table(rows, baseline, console)
    for text, is_supported, told in verdicts(rows):
        mark = {True: "supported", False: "not supported", None: "open"}[is_supported]
        console.print(f"{text}: {mark}. {told}")
    console.print(f"Look at {out / 'compare.html'}")


def spread(row: Row) -> str:
    """Returns the mean accuracy and half the range of its runs."""
    half = (max(row.accuracies) - min(row.accuracies)) / 2
    return f"{row.accuracy:.1%}" + (f" ± {half:.1%}" if len(row.accuracies) > 1 else "")


def print_table(rows: Sequence[Row], baseline: str, console: Console) -> None:
    """Prints the table; costs as multiples of the baseline's."""
    (base,) = [row for row in rows if row.name == baseline]
    table = Table("architecture", title=f"costs as multiples of {baseline}'s", title_justify="left")
    for column in ("seeing", "blind", "added", "train FLOPs", "train time", "read FLOPs", "read time"):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = (
            row.training_flops / base.training_flops,
            row.training_seconds / base.training_seconds,
            row.prefill_flops / base.prefill_flops,
            row.prefill_seconds / base.prefill_seconds,
        )
        added = f"{row.num_added / 1e3:,.0f}k"
        table.add_row(row.name, spread(row), f"{row.blind:.1%}", added, *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)


def draw_accuracies(rows: Sequence[Row], out: Path) -> None:
    """Writes a PNG of the right answers of each architecture."""
    panel = Panel("", "right answers: mean, each seed (dots), with blank pictures (dotted)", "")
    with drawn(out, panel, inches=(8, 0.55 * len(rows) + 1.4)) as (axes,):
        for number, (row, color) in enumerate(zip(rows, COLORS, strict=False)):
            axes.barh(number, row.accuracy, color=color, alpha=0.75, height=0.6)
            axes.plot(row.accuracies, [number] * len(row.accuracies), "o", color="#222222", markersize=4)
            axes.plot([row.blind] * 2, [number - 0.3, number + 0.3], color="#222222", linestyle=":")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)


def draw_accuracy_by_flops(rows: Sequence[Row], out: Path) -> None:
    """Writes a PNG of the right answers over what a prompt costs, as figure 1 of the paper."""
    panel = Panel("", "10^6 FLOPs to read a prompt with an image, without the encoder", "right answers")
    with drawn(out, panel, inches=(8, 4.2)) as (axes,):
        for row, color in zip(rows, COLORS, strict=False):
            flops = row.prefill_flops / 1e6
            axes.plot([flops] * 2, [min(row.accuracies), max(row.accuracies)], color=color, alpha=0.6)
            axes.plot(flops, row.accuracy, "o", color=color, markersize=8, label=row.name)
        axes.set_xlim(left=0)
        axes.legend(**LEGEND)
