"""Printed counts agree with their nouns: `common.console.count_text` writes them all."""

import ast
import re
from pathlib import Path

from common.console import count_text
from tests.source_files import ROOT, source_files

PACKAGES = ("common", "data_prep", "model", "pipeline", "orchestration")
NOUNS = (
    "row|sample|image|record|shard|file|question|answer|step|turn|token|problem|weight|parameter|tensor|epoch|layer|page|"
    "process|target|position|checkpoint|picture|part|pack|word|character|sequence"
)
A_NOUN = re.compile(rf" (?:new |text |visual |training )?({NOUNS})(?:e?s)\b(?!/)")


def written(path: Path) -> list[str]:
    """Returns where the f-strings of a file write a number and a plural by themselves, as `file:line {number} rows`."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for value, text in zip(node.values, node.values[1:], strict=False) if isinstance(node, ast.JoinedStr) else ():
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                number = value.value
                is_number = not isinstance(number, ast.Call) or ast.unparse(number.func) in ("len", "sum", "int")
                if is_number and (noun := A_NOUN.match(str(text.value))):
                    found.append(f"{path}:{value.lineno} {{{ast.unparse(number)}}}{noun[0]}")
    return found


def test_a_count_agrees_with_its_noun():
    assert [count_text(number, "visual token") for number in (0, 1, 2, 2000)] == [
        "0 visual tokens",
        "1 visual token",
        "2 visual tokens",
        "2,000 visual tokens",
    ]


def test_no_count_is_written_without_it(tmp_path):
    """But in the Python files of an export, which stand alone."""
    (tmp_path / "a.py").write_text("f'{n:,} rows, {len(x)} new samples, {rate} rows/s, {count_text(n, 'row')} shards'")
    assert [line.partition(" ")[2] for line in written(tmp_path / "a.py")] == ["{n} rows", "{len(x)} new samples"]
    files = [ROOT / file for file in source_files(PACKAGES) if file.suffix == ".py" and file.parent.name != "hf"]
    assert len(files) > 80
    assert [line for file in files for line in written(file)] == []
