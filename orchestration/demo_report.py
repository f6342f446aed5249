"""What a finished demo shows: a loss curve, a page of answers beside their pictures, a table of scores.

Seeing and blind are the same model on the same questions, with the pictures and with blank ones: the difference is what
it reads from them.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.console import count_text
from common.files import write_whole
from common.pages import image_url, render_page
from common.plots import COLORS, LEGEND, Panel, drawn
from pipeline.evaluation.questions import Answer, EvaluationResult

STAGES = ("Stage 1: one shared projector", "Stage 2: all projectors and the LLM")
MIN_PICTURE_PIXELS = 160
"""Smaller pictures are enlarged by a whole factor, their pixels kept sharp."""


def write_loss_curve(stage1: Sequence[dict], stage2: Sequence[dict], out: Path) -> None:
    """Writes a PNG of two panels, the loss of each step and its running mean.

    Args:
        stage1: Metrics with at least `step` and `loss`, in order.
        stage2: The same.
        out: File to write.
    """
    with drawn(out, *(Panel(title, "step", "loss") for title in STAGES)) as panels:
        for axes, color, metrics in zip(panels, COLORS, (stage1, stage2), strict=False):
            _draw_loss(axes, color, metrics)


def running_mean(values: Sequence[float], half_life: float) -> list[float]:
    """Returns the exponential mean of the values so far, where `half_life` steps ago weighs half; unbiased at first."""
    decay = 0.5 ** (1 / half_life)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * decay + value, weight * decay + 1
        means.append(total / weight)
    return means


def choose_examples(
    seeing: EvaluationResult, blind: EvaluationResult, num_examples: int
) -> list[tuple[Answer, Answer]]:
    """Returns pairs of a seeing and a blind answer to one question: the families in turn, pictures as new as possible.

    Nothing is chosen by whether it is right, so the page is as good as the model is.
    """
    families: dict[str, list[tuple[Answer, Answer]]] = {}
    for pair in _paired(seeing, blind):
        families.setdefault(pair[0].question.family, []).append(pair)
    chosen: list[tuple[Answer, Answer]] = []
    shown: set[tuple[str, ...]] = set()
    for family in islice(cycle(sorted(families)), num_examples * len(families)):
        if len(chosen) == num_examples:
            break
        pairs = families[family]
        if pairs:
            fresh = next((i for i, (answer, _) in enumerate(pairs) if answer.question.images not in shown), 0)
            chosen.append(pairs.pop(fresh))
            shown.add(chosen[-1][0].question.images)
    return chosen


def write_examples(
    seeing: EvaluationResult, blind: EvaluationResult, images: Path, out: Path, num_examples: int = 24
) -> None:
    """Writes an HTML page of example answers that needs no other file.

    Args:
        seeing: Answers with the pictures.
        blind: Answers of the same model to the same questions without them.
        images: Folder that the questions' image paths start from.
        out: File to write.
        num_examples: Answers to show, if there are so many.

    Raises:
        ValueError: the two results do not answer the same questions.
    """
    chosen = choose_examples(seeing, blind, num_examples)
    num_right = sum(answer.correct for answer, _ in chosen)
    summary = (
        f"{seeing.accuracy:.1%} of {count_text(seeing.num_questions, 'question')} right, {blind.accuracy:.1%} without "
        f"the picture. Below, {len(chosen)} of them, chosen without looking at the answers: {num_right} right."
    )
    cards = [
        {"answer": answer, "blind": unseen, "pictures": [_picture(images / name) for name in answer.question.images]}
        for answer, unseen in chosen
    ]
    template = Path(__file__).with_name("demo_report.html.jinja")
    out.parent.mkdir(parents=True, exist_ok=True)
    page = render_page(template, summary=summary, scores=list(_scores(seeing, blind)), cards=cards)
    write_whole(out, page.encode())


def print_scores(seeing: EvaluationResult, blind: EvaluationResult, console: Console) -> None:
    """Prints the accuracy of each family and of all, with the pictures and without.

    Raises:
        ValueError: the two results do not answer the same questions.
    """
    num_questions: dict[str, int] = {}
    for answer, _ in _paired(seeing, blind):
        num_questions[answer.question.family] = num_questions.get(answer.question.family, 0) + 1
    table = Table("questions", title="right answers", title_justify="left")
    for column in ("number", "seeing", "blind"):
        table.add_column(column, justify="right")
    rows = list(_scores(seeing, blind))
    for index, (name, seen, unseen) in enumerate(rows):
        is_all = index == len(rows) - 1
        number = seeing.num_questions if is_all else num_questions[name]
        cells = (name, f"{number:,}", f"{seen:.1%}", f"{unseen:.1%}")
        table.add_row(*cells, style="bold" if is_all else None, end_section=index == len(rows) - 2)
    console.print(table)


def _paired(seeing: EvaluationResult, blind: EvaluationResult) -> Iterable[tuple[Answer, Answer]]:
    if [answer.question for answer in seeing.answers] != [answer.question for answer in blind.answers]:
        raise ValueError("the seeing and the blind answers are not to the same questions; evaluate both on one file")
    return zip(seeing.answers, blind.answers, strict=True)


def _scores(seeing: EvaluationResult, blind: EvaluationResult) -> Iterable[tuple[str, float, float]]:
    """Yields the name, seeing and blind accuracy of each family, and of all."""
    blind_families = blind.per_family
    for family, accuracy in seeing.per_family.items():
        yield family, accuracy, blind_families[family]
    yield "all", seeing.accuracy, blind.accuracy


def _draw_loss(axes: Axes, color: str, metrics: Sequence[dict]) -> None:
    steps, losses = [row["step"] for row in metrics], [row["loss"] for row in metrics]
    if not metrics:
        return
    axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.9, label="each step")
    means = running_mean(losses, half_life=max(1.0, len(losses) / 120))
    axes.plot(steps, means, color=color, linewidth=1.8, label="running mean")
    axes.set_xlim(min(0, steps[0]), max(steps[-1], steps[0] + 1))
    axes.set_ylim(0, max(losses) * 1.05)
    axes.annotate(
        f"{means[-1]:.3g}", (steps[-1], means[-1]), (-4, 8), textcoords="offset points", ha="right", color=color
    )
    axes.legend(**LEGEND, loc="center right")


def _picture(file: Path) -> str:
    """Returns a picture as a URL of itself, enlarged if it is small."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    factor = max(1, -(-MIN_PICTURE_PIXELS // max(picture.size)))
    return image_url(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))
