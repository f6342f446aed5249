"""Shows exactly what each rank would see at a step: `make preview CONFIG=x.yaml STEP=123 [RANKS=8]`.

No model is loaded and no process group is started; the packs are those that a run of the same configuration on that
many data-parallel ranks trains on at that step. In the text, targets stand in brackets and images as `<image>`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from common.console import UsageError, build_console, run
from common.files import write_whole
from pipeline.config import load_config


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run")],
    step: Annotated[int, typer.Option(help="which global batch, counted from 0")] = 0,
    ranks: Annotated[int, typer.Option(help="data-parallel ranks of the run")] = 1,
    rank: Annotated[int | None, typer.Option(help="show this one only")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with the images instead of printing")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, after the file")] = None,
) -> None:
    """Show the packs of one step: decoded text with targets marked, images, sizes."""
    resolved, console = load_config(config, overrides or []), build_console()
    # These take seconds: not before the configuration is known to be right
    from pipeline.data.batches import RankCoordinates, build_source, load_table, open_shards
    from pipeline.data.preview_page import describe, headline, marked, page

    sets = open_shards(resolved)
    table = load_table(resolved, sets, build_console(stderr=True))
    shown = range(ranks) if rank is None else [rank]
    if ranks < 1 or (rank is not None and not 0 <= rank < ranks):
        raise UsageError(f"--rank {rank} --ranks {ranks}: name a rank below the number of ranks")
    sources = [build_source(resolved, sets, table, RankCoordinates(number, ranks)) for number in shown]
    if not 0 <= step < sources[0].num_steps:
        raise UsageError(f"--step {step}: the run has steps 0 to {sources[0].num_steps - 1}")
    if html:
        write_whole(html, page(sources, step).encode())
        console.print(f"step {step} is drawn in {html}")
        return
    console.print(headline(sources[0], step))
    for source in sources:
        for name, spans, _ in describe(source, step):
            console.print(name, style="bold")
            console.print(Text.assemble(*(marked(span) for span in spans)))


if __name__ == "__main__":
    run(main)
