"""Layers in the order of what they contribute, and the `shortv` that follows from it.

Source: ShortV (arXiv 2504.00502); its authors freeze 19 of 32 layers and 24 of 40: three fifths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any, Literal

import yaml
from matplotlib.ticker import MaxNLocator

from common.console import count_text
from common.plots import COLORS, LEGEND, Panel, drawn
from pipeline.evaluation.questions import Question

Direction = Literal["frozen-original", "original-frozen"]
SYMBOLS: Mapping[Direction, str] = {
    "frozen-original": "KL(frozen || original)",
    "original-frozen": "KL(original || frozen)",
}
FROZEN_FRACTION = 0.6


@dataclass(frozen=True)
class Contributions:
    """What each layer contributes.

    Attributes:
        by_sample: nats, for every sample a number for each layer.
        direction: of the divergence.
        num_frozen: how many layers are to be frozen.
    """

    by_sample: Sequence[Sequence[float]]
    direction: Direction
    num_frozen: int

    @property
    def means(self) -> list[float]:
        """Of each layer over the samples, in nats."""
        return [mean(layer) for layer in zip(*self.by_sample, strict=True)]

    @property
    def standard_errors(self) -> list[float]:
        """Of these means; 0 for one sample."""
        num_samples = len(self.by_sample)
        layers = zip(*self.by_sample, strict=True)
        return [stdev(layer) / num_samples**0.5 if num_samples > 1 else 0.0 for layer in layers]

    @property
    def ranking(self) -> list[int]:
        """The layers, least contribution first; of equals the lower one."""
        means = self.means
        return sorted(range(len(means)), key=lambda layer: means[layer])

    @property
    def frozen_layers(self) -> list[int]:
        """Those that contribute least, in order of depth."""
        return sorted(self.ranking[: self.num_frozen])


def usual_num_frozen(num_layers: int) -> int:
    """Returns how many layers are frozen where nobody says: three fifths."""
    return max(1, round(FROZEN_FRACTION * num_layers))


def shuffled_questions(questions: Sequence[Question], num_samples: int, seed: int, data: str) -> list[Question]:
    """Returns the questions about images, in a random order that the seed decides.

    Raises:
        ValueError: They are fewer than are wanted.
    """
    seeing = [question for question in questions if question.images]
    if len(seeing) < num_samples:
        raise ValueError(
            f"{data} has {count_text(len(seeing), 'question')} with an image, and --samples {num_samples} wants more; "
            "give more rows, or fewer --samples"
        )
    return Random(seed).sample(seeing, len(seeing))


def shortv_yaml(contributions: Contributions, model: str) -> str:
    """Returns the settings of a run that freezes the layers which contribute least."""
    layers, samples = contributions.frozen_layers, count_text(len(contributions.by_sample), "sample")
    settings = {"model": {"architecture": "shortv", "frozen_layers": layers}}
    comments = (
        f"Visual tokens stay as they are in the {count_text(len(layers), 'layer')} of {model} that contribute least,",
        f"by {SYMBOLS[contributions.direction]} over {samples}. All layers, least first:",
        ", ".join(map(str, contributions.ranking)),
        f'make train CONFIG=... ARGS="model.architecture=shortv model.frozen_layers=[{",".join(map(str, layers))}]"',
    )
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(settings, sort_keys=False)


def as_json(contributions: Contributions, **more: Any) -> dict[str, Any]:
    """Returns what the JSON file holds."""
    return {
        **more,
        "direction": SYMBOLS[contributions.direction],
        "num_samples": len(contributions.by_sample),
        "contributions": contributions.means,
        "standard_errors": contributions.standard_errors,
        "ranking": contributions.ranking,
        "frozen_layers": contributions.frozen_layers,
    }


def draw(contributions: Contributions, out: Path) -> None:
    """Writes a PNG: a dot for each layer, those to freeze in another colour.

    The scale is logarithmic down to the smallest contribution above 0, and linear from there to 0.
    """
    means, errors, frozen = contributions.means, contributions.standard_errors, set(contributions.frozen_layers)
    title = f"Layer Contribution, {count_text(len(contributions.by_sample), 'sample')}"
    panel = Panel(title, "layer", f"{SYMBOLS[contributions.direction]}, nats")
    with drawn(out, panel, inches=(8, 3.6)) as (axes,):
        parts = {"kept": [i for i in range(len(means)) if i not in frozen], "to freeze": sorted(frozen)}
        for (label, layers), color in zip(parts.items(), COLORS, strict=False):
            heights, spreads = ([values[i] for i in layers] for values in (means, errors))
            style = {"fmt": "o", "markersize": 5, "elinewidth": 1, "clip_on": False}
            axes.errorbar(layers, heights, yerr=spreads, color=color, label=label, **style)
        axes.set_yscale("symlog", linthresh=min((mean for mean in means if mean > 0), default=1.0))
        axes.set_ylim(0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(**LEGEND)
