"""The inference FLOPs of the paper's tables 2 and 5 and its figure 4, computed anew, beside those of our own modules.

Source: arXiv 2502.02458; `model.paper_flops` has the formulas.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from common.console import count_text
from common.plots import COLORS, LEGEND, Panel, drawn
from model.config import ModelConfig
from model.flops import forward_flops
from model.hf.family_saisa import Architecture
from model.paper_flops import PaperSizes, llama_3_2_flops, llava_flops, open_flamingo_flops, saisa_flops

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
NUM_TEXT, NUM_VISUAL = 64, 576  # of the paper's tables
PAPER_WIDTH = 1024  # d of CLIP ViT-L, which the paper's numbers have for every encoder
ENCODERS = {"CLIP": (24, 1024), "SigLIP": (27, 1152), "ConvNeXt": (32, 3072)}
"""Rows of the square grid of visual tokens, and the width of their features: CLIP ViT-L at 336 pixels, SigLIP SO400M at
384, OpenCLIP's ConvNeXt-XXL at 1,024.
"""
LLMS = {"Vicuna-7B": "saisa-vicuna-7b", "Mistral-7B": "saisa-mistral-7b", "Llama-3-8B": "saisa-llama3-8b"}
CLIP, SIGLIP, CONVNEXT = ENCODERS
PUBLISHED: dict[tuple[str, str, str], dict[Architecture, float]] = {
    ("2", "Vicuna-7B", CLIP): {"llava": 8.53, "saisa": 2.86},
    ("5", "Mistral-7B", CLIP): {"llava": 9.17, "saisa": 2.10},
    ("5", "Llama-3-8B", CLIP): {"llava": 9.17, "saisa": 2.10},
    ("5", "Vicuna-7B", SIGLIP): {"llava": 10.63, "saisa": 3.40},
    ("5", "Vicuna-7B", CONVNEXT): {"llava": 14.76, "saisa": 4.44},
}
"""TFLOPs by table, language model and encoder."""
FORMULAS: dict[Architecture, Callable[[PaperSizes, int, int], int]] = {"llava": llava_flops, "saisa": saisa_flops}
CROSS_ATTENTION = {"open_flamingo": open_flamingo_flops, "llama_3_2": llama_3_2_flops}
VISUAL_AXIS = range(0, 2881, 96)  # 2,880 are five images
TEXT_AXIS = range(0, 1025, 32)


@dataclass(frozen=True)
class Row:
    """One number of the paper, beside ours; all but `published` in FLOPs.

    Attributes:
        table: of the paper; "" where it is none of its numbers.
        model: language model and encoder.
        architecture: of the family, or a kind of cross-attention.
        published: TFLOPs, to two digits.
        formula: by the paper's formula from the models' own sizes.
        explained: by the formula with the input that gives the published number.
        explanation: says that input; empty where the model's own sizes give it.
        counted: what our modules do, by `model.flops`.
        counted_by_torch: the same, as torch's counter finds it in the Hugging Face model.
    """

    table: str
    model: str
    architecture: str
    published: float | None
    formula: int
    explained: int | None = None
    explanation: str = ""
    counted: int | None = None
    counted_by_torch: int | None = None


def load_model(llm: str, encoder: str) -> ModelConfig:
    """Returns the sizes of a language model with an encoder, by their names in `LLMS` and `ENCODERS`."""
    model = ModelConfig.model_validate(yaml.safe_load((MODELS / f"{LLMS[llm]}.yaml").read_text()))
    side, width = ENCODERS[encoder]
    vision = model.vision.model_copy(update={"hidden_size": width, "image_size": side * model.vision.patch_size})
    return model.model_copy(update={"vision": vision})


def explain(
    formula: Callable[[PaperSizes, int, int], int], sizes: PaperSizes, num_visual: int, published: float
) -> tuple[int | None, str]:
    """Returns the FLOPs that round to a published number and the input that gives them; nothing if a model's own do.

    An input is changed alone: the number that two changes give would say nothing about either.
    """

    def rounds_to(flops: int) -> bool:
        return f"{flops / 1e12:.2f}" == f"{published:.2f}"

    if rounds_to(formula(sizes, num_visual, NUM_TEXT)):
        return None, ""
    inputs = {
        f"d = {PAPER_WIDTH:,}, where this encoder's features have {sizes.d:,}": replace(sizes, d=PAPER_WIDTH),
        f"k = h = {sizes.h:,} for the keys and values of text, where k = {sizes.k:,}": replace(sizes, k_text=sizes.h),
    }
    for explanation, changed in inputs.items():
        if rounds_to(flops := formula(changed, num_visual, NUM_TEXT)):
            return flops, explanation
    return None, "no one input gives the published number"


def build_rows(count_by_torch: Callable[[ModelConfig, int], int] | None = None) -> Iterator[Row]:
    """Yields the rows of the table; `count_by_torch` counts a model as it reads an image and some text."""
    for (table, llm, encoder), published in PUBLISHED.items():
        base = load_model(llm, encoder)
        for architecture, number in published.items():
            model = base.model_copy(update={"architecture": architecture})
            sizes, num_visual = PaperSizes.of(model), model.vision.num_tokens
            explained, explanation = explain(FORMULAS[architecture], sizes, num_visual, number)
            yield Row(
                table=table,
                model=f"{llm}, {encoder}",
                architecture=architecture,
                published=number,
                formula=FORMULAS[architecture](sizes, num_visual, NUM_TEXT),
                explained=explained,
                explanation=explanation,
                counted=forward_flops(model, NUM_TEXT, num_visual, 1),
                counted_by_torch=count_by_torch and count_by_torch(model, NUM_TEXT),
            )
    base = load_model("Vicuna-7B", CLIP)
    sizes = base.model_dump(exclude={"resampler_tokens"})  # a kind of cross-attention has its own
    for name, formula in CROSS_ATTENTION.items():
        blocks = {"architecture": "flamingo", "cross_attention": name, "cross_attention_every": 4}
        model = ModelConfig.model_validate(sizes | blocks)
        yield Row(
            table="",
            model=f"Vicuna-7B, {CLIP}",
            architecture=name,
            published=None,
            formula=formula(PaperSizes.of(base), NUM_VISUAL, NUM_TEXT),
            counted=forward_flops(model, NUM_TEXT, model.num_tokens_per_image, 1),
        )


def figure_lines() -> dict[str, dict[str, Sequence[int]]]:
    """Returns the curves of figure 4, in FLOPs: against visual tokens at 64 of text, against text at 576 visual."""
    sizes = PaperSizes.of(load_model("Vicuna-7B", CLIP))
    formulas = {**FORMULAS, "open_flamingo": open_flamingo_flops}
    by_visual = {name: [formula(sizes, v, NUM_TEXT) for v in VISUAL_AXIS] for name, formula in formulas.items()}
    by_text = {name: [formula(sizes, NUM_VISUAL, t) for t in TEXT_AXIS] for name, formula in formulas.items()}
    return {
        "visual": {"num_tokens": list(VISUAL_AXIS), **by_visual},
        "text": {"num_tokens": list(TEXT_AXIS), **by_text},
    }


def draw_figure(lines: Mapping[str, Mapping[str, Sequence[int]]], out: Path) -> None:
    """Writes figure 4 as a PNG.

    Raises:
        OSError: The file cannot be written.
    """
    panels = (
        Panel(f"Vicuna-7B, {count_text(NUM_TEXT, 'text token')}", "visual tokens", "TFLOPs of a prompt"),
        Panel(f"Vicuna-7B, {count_text(NUM_VISUAL, 'visual token')}", "text tokens", "TFLOPs of a prompt"),
    )
    with drawn(out, *panels) as all_axes:
        for axes, curves in zip(all_axes, lines.values(), strict=True):
            for color, (name, flops) in zip(COLORS, list(curves.items())[1:], strict=False):
                axes.plot(curves["num_tokens"], [number / 1e12 for number in flops], color=color, label=name)
            axes.set_xlim(0)
            axes.set_ylim(0)
        published = PUBLISHED["2", "Vicuna-7B", CLIP]
        for axes, at in zip(all_axes, (NUM_VISUAL, NUM_TEXT), strict=True):
            axes.scatter([at] * len(published), list(published.values()), color="black", s=14, zorder=3, label="paper")
            axes.legend(**LEGEND)


def as_json(rows: Sequence[Row], lines: Mapping[str, Mapping[str, Sequence[int]]]) -> dict:
    """Returns what the command's JSON file holds; FLOPs as whole numbers."""
    return {
        "num_text": NUM_TEXT,
        "rows": [asdict(row) for row in rows],
        "figure_4": lines,
    }
