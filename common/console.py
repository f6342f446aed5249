"""What every command of this project does at its edge: exit codes and one-line errors.

    0  the work is done
    1  it failed: bad data, a missing file, a full disk
    2  the command line or the configuration is wrong (nothing was started)

Code raises `ValueError` (or `OSError`) for what a user can fix and this file turns it into one line without a
traceback; set `SAISA_TRACEBACK=1` to see where it came from. Any other exception is a bug and keeps its traceback.

Names and texts of a data set are printed as they are, here alone: rich would take `[/INST]` for markup, `:)` for an
emoji, and a terminal would obey its escape sequences.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from io import TextIOWrapper
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.segment import Segment

from common.write_errors import way_out

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys; a tab and the end of a line do no harm."""

TOLD_ELSEWHERE = "another process of this run says so"  # a note on an error that this one need not print


class UsageError(ValueError):
    """A wrong command line or configuration: the command ends with exit status 2."""


def plain(text: str, encoding: str = "utf-8") -> str:
    r"""Returns a text with `\x1b` or `\u56fe` for each character that a terminal would obey or cannot show."""
    text = CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def count_text(number: int, noun: str) -> str:
    """Returns `1 row`, `0 rows` or `2,000 rows` for the noun `row`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _PlainConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields what is printed; colours and cursor moves of rich's own are not part of a segment's text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text, self.encoding), style, control)


def build_console(stderr: bool = False, **options: Any) -> Console:
    """Returns a console that prints every text as it is; a style is given beside a text, never in it."""
    return _PlainConsole(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False, **options)


def build_progress(console: Console, *columns: str | ProgressColumn, **options: Any) -> Progress:
    """Returns a progress display; a column that is a text shows fields of the task, such as `{task.description}`."""
    built = [TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns]
    return Progress(*built, console=console, **options)


def run(main: Callable[..., None]) -> None:
    """Runs `main` as the command line of this process: its parameters become options, its docstring the help."""
    if isinstance(sys.stdout, TextIOWrapper):  # like stderr: a name outside the locale must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(main))
    app()


def command[**P](function: Callable[P, None]) -> Callable[P, None]:
    """Returns `function` with user errors turned into one line on stderr and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("SAISA_TRACEBACK"):
                raise
            _report(error)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None

    return wrapped


def _report(error: ValueError | OSError) -> None:
    """Prints the line; of several processes (under torchrun) each says who it is.

    A wrong configuration is wrong for all of a machine, so the first there says it; of an error that several have, one.
    """
    if TOLD_ELSEWHERE in getattr(error, "__notes__", ()):
        return
    if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UsageError):
        who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (process {os.environ['RANK']})"
        print(f"error{who}: {plain(describe(error))}", file=sys.stderr)


def describe(error: ValueError | OSError) -> str:
    """Returns what an error says to a user, in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}{way_out(error)}"  # without Python's "[Errno 2]"
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG")
        return f"{error.object!a} cannot be said in the locale LC_ALL={locale}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    return str(error)
