"""The user hears of each kind of problem once, and of the end when there are too many."""

import io

import pytest
from rich.console import Console

from data_prep.records import Reject
from data_prep.reporting import RejectLog, TooManyRefused


def rejects(kind: str, *indices: int) -> list[Reject]:
    return [Reject(i, f"id{i}", "a[1].jpg", kind, f"{kind} is wrong") for i in indices]


def test_one_line_a_kind_and_a_table_with_counts() -> None:
    stream = io.StringIO()
    reject_log = RejectLog("rows.json", 1000, 0.01, Console(file=stream, width=150))
    reject_log.add(rejects("role", 5, 6, 7))
    reject_log.add(rejects("turn", 8) + rejects("role", 2))
    assert stream.getvalue().splitlines() == [
        "refused (role): rows.json record id5 (index 5): role is wrong (a[1].jpg)",
        "refused (turn): rows.json record id8 (index 8): turn is wrong (a[1].jpg)",
    ]
    reject_log.show_table()
    rows = [" ".join(line.replace("\u2502", " ").split()) for line in stream.getvalue().splitlines()]
    assert "role 4 rows.json record id2 (index 2): role is wrong (a[1].jpg)" in rows
    assert "turn 1 rows.json record id8 (index 8): turn is wrong (a[1].jpg)" in rows


def test_the_limit_is_a_fraction_of_all_rows() -> None:
    reject_log = RejectLog("rows.json", 300, 0.01, Console(file=io.StringIO()))
    reject_log.add(rejects("role", 0, 1, 2))
    with pytest.raises(
        TooManyRefused, match=r"^4 of 300 rows of rows\.json refused, more than --max-bad-fraction 0\.01"
    ):
        reject_log.add(rejects("role", 3))
    RejectLog("rows.json", 3, 0, Console(file=io.StringIO())).add([])
