"""Ranks the layers of an exported `llava` by what their update of visual tokens contributes, for `shortv`.

    python -m pipeline.layer_contribution --model exports/llava --data questions.json --images images --out runs/shortv

The folder gets contribution.json, contribution.png, and shortv.yaml, which freezes the layers that contribute least.
`pipeline.evaluation.contribution` says what is measured.
"""

import json
from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Option

from common.console import UsageError, build_console, count_text, run
from common.files import write_whole
from common.json_files import read_json_object
from data_prep.source import open_rows
from model.hf_check import check_export
from pipeline.evaluation.evaluate import find_images, parse_rows
from pipeline.evaluation.questions import questions_in
from pipeline.evaluation.ranking import (
    SYMBOLS,
    Contributions,
    Direction,
    as_json,
    draw,
    shortv_yaml,
    shuffled_questions,
    usual_num_frozen,
)


def check_architecture(model: Path) -> int:
    """Returns the number of layers of an exported `llava`.

    Raises:
        ValueError: It is another architecture.
    """
    check_export(model)
    config = read_json_object(model / "config.json", "export it again")
    if (architecture := config.get("architecture", "saisa")) != "llava":
        raise ValueError(
            f"{model / 'config.json'}: architecture={architecture!r}, but contributions are of a llava, whose layers "
            "all update visual tokens; train one with model.architecture=llava"
        )
    return config["num_hidden_layers"]


def as_table(contributions: Contributions) -> Table:
    """Returns the ranking."""
    table = Table(title=SYMBOLS[contributions.direction], title_justify="left")
    for heading in ("layer", "nats", "standard error", ""):
        table.add_column(heading, justify="right")
    means, errors, frozen = contributions.means, contributions.standard_errors, contributions.frozen_layers
    for layer in contributions.ranking:
        mark = "to freeze" if layer in frozen else ""
        table.add_row(str(layer), f"{means[layer]:.3g}", f"{errors[layer]:.2g}", mark)
    return table


def main(
    model: Annotated[Path, Option(help="exported folder of a llava")],
    data: Annotated[str, Option(help="LLaVA rows with questions about images: all that `make shards` takes")],
    out: Annotated[Path, Option(help="folder for contribution.json, contribution.png and shortv.yaml")],
    images: Annotated[str | None, Option(help="folder, zip or URL of the images that are not inside the rows")] = None,
    rows: Annotated[str | None, Option(help="a:b, only these rows of --data")] = None,
    samples: Annotated[int, Option(min=1, help="questions to measure, drawn at random")] = 40,
    seed: Annotated[int, Option(help="of the draw")] = 0,
    direction: Annotated[
        Direction, Option(help="of the divergence; the first is KL(frozen || original), as its authors compute it")
    ] = "frozen-original",
    num_frozen: Annotated[int | None, Option(min=1, help="layers to freeze; default: three fifths")] = None,
    batch_size: Annotated[int, Option(min=1, help="prompts read at once")] = 8,
) -> None:
    """Ranks the layers of a llava by what their update of visual tokens contributes."""
    chosen = parse_rows(rows)
    with open_rows(data) as (found, inside):
        questions = questions_in(found, data, chosen)
        num_layers = check_architecture(model)
        if num_frozen is not None and num_frozen > num_layers:
            raise UsageError(f"--num-frozen {num_frozen} is more than the {count_text(num_layers, 'layer')} of {model}")
        questions = shuffled_questions(questions, samples, seed, data)
        entries = find_images(questions, images, inside)
        out.mkdir(parents=True, exist_ok=True)
        from pipeline.evaluation.contribution import measure_contributions  # takes seconds, as in `evaluate`

        by_sample, num_too_long = measure_contributions(model, questions, entries, samples, direction, batch_size)
    result = Contributions(by_sample, direction, num_frozen or usual_num_frozen(num_layers))
    about = {"model": str(model), "data": data, "seed": seed, "num_too_long": num_too_long}
    write_whole(out / "contribution.json", f"{json.dumps(as_json(result, **about), indent=1)}\n".encode())
    write_whole(out / "shortv.yaml", shortv_yaml(result, str(model)).encode())
    draw(result, out / "contribution.png")
    console = build_console()
    console.print(as_table(result))
    if num_too_long:
        console.print(f"{count_text(num_too_long, 'question')} left out, too long for the model's positions")
    console.print(f"Look at {out / 'contribution.png'}; {out / 'shortv.yaml'} has the layers to freeze")


if __name__ == "__main__":
    run(main)
