"""Plots as PNG files, all in one style.

    with drawn(out, Panel("FLOPs", "visual tokens", "TFLOPs"), Panel(...)) as (left, right):
        left.plot(xs, ys, color=COLORS[0], label="saisa")
        left.legend(**LEGEND)
        right.barh(...)

What is drawn on a panel's axes is matplotlib's own. The file is written when the block ends, whole or not at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.files import whole_file

COLORS = ("#2a6fb0", "#b0442a", "#4a8f3c", "#8257a8", "#b8860b", "#3d8f8f", "#7a7a7a", "#c2577f")
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}
PIXELS_PER_INCH = 144


class Panel(NamedTuple):
    """What stands around one drawing."""

    title: str
    x_label: str
    y_label: str


@contextmanager
def drawn(out: Path, *panels: Panel, inches: tuple[float, float] = (5, 3.6)) -> Iterator[list[Axes]]:
    """Yields the axes of panels side by side, and writes them as a PNG once they are drawn.

    Args:
        out: File to write; its folder is made.
        panels: One at least.
        inches: Width and height of a panel, at `PIXELS_PER_INCH`.

    Raises:
        OSError: The file cannot be written.
    """
    figure = Figure(figsize=(inches[0] * len(panels), inches[1]), dpi=PIXELS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_title(panel.title, fontsize=11, loc="left")
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    yield all_axes
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        figure.savefig(file, format="png")
