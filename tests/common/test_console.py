"""Exit statuses and one-line errors, of one process and of several."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from common.console import UsageError, build_console, build_progress, plain
from tests.command_line import run_command

BAD_DATA, BAD_SETTING = ValueError("row 7 is bad"), UsageError("trian.seed is unknown")
NO_FILE = FileNotFoundError(2, "No such file or directory", "rows.json")


def fails_with(error: Exception):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BAD_DATA, 1, "error: row 7 is bad"),
        (BAD_SETTING, 2, "error: trian.seed is unknown"),
        (NO_FILE, 1, "error: rows.json: No such file or directory"),
    ],
)
def test_what_a_user_can_fix_is_one_line(error, status, line):
    assert run_command(fails_with(error)) == (status, line + "\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(fails_with(KeyError("x")))


@pytest.mark.parametrize(
    ("rank", "error", "status", "said"),
    [
        ("0", BAD_SETTING, 2, "error (process 0): trian.seed is unknown\n"),
        ("3", BAD_SETTING, 2, ""),  # which the first of the machine says
        ("8", BAD_SETTING, 2, "error (process 8): trian.seed is unknown\n"),
        ("3", BAD_DATA, 1, "error (process 3): row 7 is bad\n"),
    ],
)
def test_each_of_several_processes_says_who_it_is(rank, error, status, said, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", str(int(rank) % 8))
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert run_command(fails_with(error)) == (status, said)


STRANGE = ["a turn [/INST] ends", "page[b]3[v2]", "set[/v1]", ":smile: 1234", "[link=http://x]y[/link]", "\\[b]"]


@pytest.mark.parametrize("text", STRANGE)
def test_texts_are_printed_as_they_are(text):
    stream = io.StringIO()
    console = build_console(file=stream, width=80, force_terminal=True)
    console.print(text)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    with build_progress(console, "{task.description}", "{task.fields[note]}", refresh_per_second=0.1) as progress:
        progress.add_task(text, note=text)
        progress.refresh()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert said.startswith(f"{text}\n") and said.count(text) >= 6


def test_what_a_terminal_would_obey_or_cannot_show_is_spelled_out():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    console = build_console(file=stream)
    console.print("\x1b[2J\x1b]0;title\x07 \x9b31m caf\xe9 \u56fe.jpg \udcff", style="bold")
    console.print(Text("in\x1b[31m red\r\n\tand on"))
    stream.seek(0)
    first, second, third, *_ = stream.read().split("\n")
    assert first == r"\x1b[2J\x1b]0;title \x9b31m caf" + "\xe9" + r" \u56fe.jpg \udcff"
    assert (second, third.strip()) == (r"in\x1b[31m red", "and on")
    assert plain("a\x00b\x1b\x7f\x9b \tc\nd") == "a\\x00b\\x1b\\x7f\\x9b \tc\nd"
    assert run_command(fails_with(ValueError("record \x1b[2J[/b]")))[1] == "error: record \\x1b[2J[/b]\n"


def test_nothing_else_prints_through_rich():
    """Every console and progress display comes from `common.console`, which lets no text of a data set be markup."""
    folders, root = (
        ("common", "data_prep", "model", "pipeline", "orchestration", "benchmarks"),
        Path(__file__).parents[2],
    )
    forbidden, found = {"Console", "Progress", "TextColumn", "from_markup", "render_str", "track"}, set()
    for file in (file for folder in folders for file in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in forbidden or "markup" in {keyword.arg for keyword in node.keywords}:
                    found.add((file.name, name))
            elif isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.prompt", "rich.markup"):
                found.add((file.name, node.module))
    assert {name for name in found if name[0] != "console.py"} == {("answers.py", "track")}  # of our own progress
    assert ("console.py", "Progress") in found
