"""What the commands that trace a step have in common: which step, of which process, with what in its packs."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from benchmarks.fake_gpu.traces import Load
from common.console import UsageError
from pipeline.config import RunConfig

Config = Annotated[Path, Option(help="the recipe")]
World = Annotated[int, Option(help="processes", min=1)]
Packs = Annotated[int, Option(help="packs of a process in a step", min=1)]
Samples = Annotated[int | None, Option(help="samples of a pack; by default as many as a run would put in one", min=1)]
Text = Annotated[int, Option(help="text tokens of a sample, half of them targets", min=2)]
Images = Annotated[int, Option(help="images of a sample", min=0)]
Overrides = Annotated[list[str] | None, Argument(help="settings of the recipe, as section.key=value")]


def build_load(config: RunConfig, packs: int, samples: int | None, text: int, images: int) -> Load:
    """Returns what a process is given in a step; without `samples` packs are as full as a run would make them.

    Raises:
        UsageError: A run makes no such samples, or no such packs of them.
    """
    data, positions = config.data, text + images * config.model.num_tokens_per_image
    if positions > data.max_positions:
        raise UsageError(
            f"--text {text} and --images {images} make {positions:,} positions, and a run cuts samples at "
            f"data.max_positions={data.max_positions}; ask for less, or raise it"
        )
    most = data.max_text_tokens_per_pack // text
    if images:  # of which a sample may have more than a pack is to have; then it has a pack of its own
        most = min(most, max(1, data.max_images_per_pack // images))
    if samples is not None and samples > most:
        raise UsageError(
            f"--samples {samples}: a pack of this run takes {most} of {text} text tokens and {images} images; ask for "
            "less, or raise data.max_text_tokens_per_pack and data.max_images_per_pack"
        )
    pp = config.parallel.pp
    if config.parallel.chunks_per_rank > 1 and packs % pp:
        raise UsageError(
            f"--packs {packs}: interleaved stages take a multiple of parallel.pp={pp}, up to which a run adds empty "
            f"packs; use {-(-packs // pp) * pp}"
        )
    return Load(packs, samples or most, text, images)
