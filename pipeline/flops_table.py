"""Prints the paper's inference FLOPs (tables 2 and 5) beside its formulas' and our own modules', and draws figure 4.

    python -m pipeline.flops_table --figure runs/figure-4.png --json runs/flops.json

It needs no weights. `pipeline.paper_tables` says what is compared, `model.paper_flops` what the formulas are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer import Option

from common.console import build_console, count_text, run
from common.files import write_whole
from pipeline.paper_tables import NUM_TEXT, Row, as_json, build_rows, draw_figure, figure_lines


def as_table(rows: Sequence[Row]) -> Table:
    """Returns the numbers in TFLOPs, with a letter where another input explains the paper's."""

    def cell(flops: int | None) -> str:
        return "" if flops is None else f"{flops / 1e12:.2f}"

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("table", "TFLOPs of a prompt"):
        table.add_column(heading, no_wrap=True)
    for heading in ("paper", "formula", "input", "counted", "torch"):
        table.add_column(heading, justify="right", no_wrap=True)
    letters = _letters(rows)
    for row in rows:
        published = "" if row.published is None else f"{row.published:.2f}"
        explained = f"{cell(row.explained)} {letters[row.explanation]}" if row.explanation else ""
        numbers = (cell(row.formula), explained, cell(row.counted), cell(row.counted_by_torch))
        table.add_row(row.table, f"{row.architecture}, {row.model}", published, *numbers)
    return table


def _letters(rows: Sequence[Row]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(row.explanation for row in rows if row.explanation), ascii_lowercase, strict=False))


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns what the columns mean, with the numbers that explain their differences."""
    llava, saisa = (next(row for row in rows if row.architecture == name) for name in ("llava", "saisa"))
    assert llava.counted is not None and saisa.counted is not None
    unread, by_formula = (llava.formula - llava.counted) / 1e12, 1 - saisa.formula / llava.formula
    return [
        f"One image and {count_text(NUM_TEXT, 'text token')}, without the encoder.",
        *(f"{letter}: {explanation}" for explanation, letter in _letters(rows).items()),
        "paper: arXiv 2502.02458; formula: its own, from the sizes of the models; input: with the one that gives "
        "the paper's number",
        "counted: what our modules do, the vocabulary for the last position only; in llava nothing reads what the last "
        f"layer leaves of visual tokens, so it is not computed ({unread:.2f} TFLOPs)",
        "torch: its counter, on the Hugging Face model",
        f"saisa takes {by_formula:.1%} fewer FLOPs than llava by the formula, {1 - saisa.counted / llava.counted:.1%} "
        "fewer as counted. Cross-attention (from the shapes of such models, not a number of the paper) takes fewer "
        "still; it pays for that in training, with blocks of its own. llama_3_2 as counted makes features as wide as "
        "the language model first, and its keys of that.",
    ]


def main(
    figure: Annotated[Path, Option(help="PNG of figure 4 to write")] = Path("runs/figure-4.png"),
    json_file: Annotated[Path | None, Option("--json", help="write the numbers here too, in FLOPs")] = None,
) -> None:
    """Prints the inference FLOPs of the paper's tables 2 and 5 beside ours, and draws its figure 4."""
    lines = figure_lines()
    draw_figure(lines, figure)
    from model.hf_sizes import count_prefill_flops  # takes seconds: not before what can be told without it

    rows = list(build_rows(count_prefill_flops))
    console = build_console()
    console.print(as_table(rows))
    for line in [*notes(rows), f"Figure 4: {figure}"]:
        console.print(line)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json_file, f"{json.dumps(as_json(rows, lines), indent=1)}\n".encode())


if __name__ == "__main__":
    run(main)
