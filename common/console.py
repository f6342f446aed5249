"""What every command of this project does at its edge: exit codes and one-line errors.

    0  the work is done
    1  it failed: bad data, a missing file, a full disk
    2  the command line or the configuration is wrong (nothing was started)

Code raises `ValueError` (or `OSError`) for what a user can fix and this file turns it into one line without a
traceback; set `SAISA_TRACEBACK=1` to see where it came from. Any other exception is a bug and keeps its traceback.
"""

import functools
import os
import sys
from collections.abc import Callable

import typer


class UsageError(ValueError):
    """A wrong command line or configuration: the command ends with exit status 2."""


def run(main: Callable[..., None]) -> None:
    """Runs `main` as the command line of this process: its parameters become options, its docstring the help."""
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

    A wrong configuration is wrong for all of a machine, so the first there says it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UsageError):
        who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (process {os.environ['RANK']})"
        print(f"error{who}: {_tell(error)}", file=sys.stderr)


def _tell(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # without Python's "[Errno 2]"
    return str(error)
