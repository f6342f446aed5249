"""Exit statuses and one-line errors, of one process and of several."""

import pytest

from common.console import UsageError
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
