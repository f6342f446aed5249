"""What `make shards` costs, measured: `python -m benchmarks.shards write`, or decode, scale, plan, shrink.

Every one generates its input in a temporary folder (set TMPDIR to choose the disk), prints a table, and with
`--json FILE` writes the numbers. Without options they run at the sizes of docs/benchmarks.md.
"""

import typer

from benchmarks.shards import decode, plan, scale, shrink, write
from common.console import command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
for module in (write, decode, scale, plan, shrink):
    app.command(module.__name__.rsplit(".", 1)[-1])(command(module.main))

if __name__ == "__main__":
    app()
