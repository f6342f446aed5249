"""The report as JSON and as Markdown: a table a part, with a column for each name that its rows have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_whole


@dataclass(frozen=True)
class Result:
    """What came of a part: its heading, how it ended, how long it took, its rows."""

    what: str
    status: str
    seconds: float
    rows: list[dict[str, Any]]


def write_report(folder: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Writes gpu-report.json and gpu-report.md."""
    content = {**about, "parts": [asdict(result) for result in results]}
    write_whole(folder / "gpu-report.json", (json.dumps(content, indent=1) + "\n").encode())
    write_whole(folder / "gpu-report.md", markdown(about, results).encode())


def markdown(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Returns the report as Markdown."""
    title = "# Dry run on a CPU: these numbers mean nothing" if about["dry run"] else "# What a GPU does"
    lines = [title, "", f"`make gpu-report`, commit {about['commit']}, {about['date']}."]
    for result in results:
        lines += ["", f"## {result.what}", "", f"{result.status}, {result.seconds:.0f} s", ""]
        columns = list(dict.fromkeys(name for row in result.rows for name in row))
        if columns:
            lines += [_line(columns), _line(["---"] * len(columns))]
            lines += [_line([_cell(row.get(name, "")) for name in columns]) for row in result.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "/").replace("\n", " ")
