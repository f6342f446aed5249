"""A command as a user gives it, run in this process."""

from collections.abc import Callable

import typer
from typer.testing import CliRunner

from common.console import command


def run_command(main: Callable[..., None], *arguments: object) -> tuple[int, str]:
    """Returns the exit status and what stands on stderr; an error that is none of a user's is raised."""
    app = typer.Typer()
    app.command()(command(main))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr
