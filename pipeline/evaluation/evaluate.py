"""Scores an exported checkpoint on questions with short answers.

    python -m pipeline.evaluation.evaluate --model runs/demo/export --data test.json --images images
    python -m pipeline.evaluation.evaluate ... --blind                     the same questions, every image blanked
    python -m pipeline.evaluation.evaluate ... --baseline-data train.json  and what guessing from the question gives

`pipeline.evaluation.questions` says what is asked and what counts as right.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from common.console import UsageError, count_text, plain, run
from common.files import Location, open_location, write_whole
from data_prep.image_roots import ImageEntry, ImageRoots, open_images, split_name
from data_prep.records import Refused, check_path
from data_prep.source import open_rows
from model.hf_check import check_export
from pipeline.evaluation.questions import (
    EvaluationResult,
    Question,
    question_only_accuracy,
    questions_in,
    read_questions,
)

MAX_NEW_TOKENS = 64  # an answer that ends sooner costs no more, and 8 cut some that say yes in a sentence


def evaluate(
    model_dir: Path,
    data: str | Path,
    images: str | Path | None = None,
    blind: bool = False,
    *,
    rows: slice = slice(None),
    batch_size: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Returns the model's greedy answers to the questions of LLaVA rows.

    Args:
        model_dir: Folder written by `make export`.
        data: All that `make shards` takes; a row's optional `family` names its kind of question.
        images: Folder, zip or URL that the rows' image paths start from, as of `make shards`; those inside rows win.
        blind: Replace every image by its processor's mean colour.
        rows: Which rows of `data`.
        batch_size: Questions answered at once.
        max_new_tokens: Longest answer.
        trust_remote_code: Run the Python files in `model_dir`; without it they must be those of this repository.

    Raises:
        ValueError: a file is missing or does not hold what it should, or every question is too long for the model.
    """
    with open_rows(data) as (found, inside):
        questions = questions_in(found, data, rows)
        check_export(model_dir)
        entries = find_images(questions, images, inside)
        from pipeline.evaluation.answers import answer_questions  # takes seconds: not before all that is asked is there

        answers, too_long = answer_questions(
            model_dir, questions, entries, blind, batch_size, max_new_tokens, trust_remote_code
        )
    found_as = {path: entry.found_as for (_, path), entry in entries.items() if entry.found_as}
    return EvaluationResult(answers, too_long, found_as)


def write_result(result: EvaluationResult, out: Path, **more: Any) -> None:
    """Writes the scores, `more`, and every answer as JSON."""
    scores = {
        "accuracy": result.accuracy,
        "num_questions": result.num_questions,
        "num_cut": result.num_cut,
        "num_too_long": len(result.too_long),
        "per_family": result.per_family,
        **more,
    }
    answers = [asdict(a.question) | {"answer": a.text, "correct": a.correct, "cut": a.is_cut} for a in result.answers]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, f"{json.dumps(scores | {'answers': answers}, indent=1)}\n".encode())


def parse_rows(text: str | None, option: str = "--rows") -> slice:
    """Returns the slice that `a:b`, `:b` or `a:` names; all rows for None.

    Raises:
        UsageError: it names none.
    """
    if text is None:
        return slice(None)
    try:
        first, last = (int(part) if part else None for part in text.split(":"))
    except ValueError:
        raise UsageError(f"{option}={text!r} must be a:b, such as 900:1000 or :100") from None
    if (first or 0) < 0 or (last is not None and last <= (first or 0)):
        raise UsageError(f"{option}={text!r} must name at least one row, counted from the front")
    return slice(first, last)


def find_images(
    questions: Sequence[Question],
    root: str | Path | None,
    inside: Callable[[int, str], ImageEntry | None] = lambda row, path: None,
) -> dict[tuple[int, str], ImageEntry]:
    """Returns where the images of the questions are, by row and path; found as `make shards` finds them.

    Raises:
        ValueError: one is not there, or its path or a link leads out of the folder.
    """
    roots = ImageRoots([]) if root is None else open_images([str(root)])
    folder = None if root is None else open_location(split_name(str(root))[1])
    entries: dict[tuple[int, str], ImageEntry] = {}
    for question in questions:
        for path in question.images:
            try:
                check_path(path)
                entry = entries.get((question.row, path)) or inside(question.row, path)
                entry = entry or _find_outside(roots, folder, path, question)
            except Refused as error:
                raise ValueError(f"record {question.row_id!r}, image {path!r}: {error}") from None
            if entry is None:
                there = "not inside the rows; name its folder with --images" if root is None else "check --images"
                where = path if root is None else f"{root}/{path}"
                raise ValueError(f"{where}: no such image, wanted by record {question.row_id!r}; {there}")
            entries[question.row, path] = entry
    return entries


def _find_outside(roots: ImageRoots, folder: Location | None, path: str, question: Question) -> ImageEntry | None:
    entry = roots.find(path)
    if entry and isinstance(folder, Path) and folder.is_dir() and not _is_inside(entry.file, folder):
        raise ValueError(
            f"{entry.file} is a link that leads out of --images, wanted by record {question.row_id!r}; put the "
            "image itself there"
        )
    return entry


def _is_inside(file: str, root: Path) -> bool:
    """Whether a file lies in a folder when all links are followed: rows come from outside, and links may too."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root))


def main(
    model: Annotated[Path, Option(help="exported folder")],
    data: Annotated[str, Option(help="LLaVA rows with the questions: all that `make shards` takes")],
    images: Annotated[str | None, Option(help="folder, zip or URL of the images that are not inside the rows")] = None,
    blind: Annotated[bool, Option("--blind", help="blank every image")] = False,
    rows: Annotated[str | None, Option(help="a:b, only these rows of --data")] = None,
    baseline_data: Annotated[str | None, Option(help="training rows: also score guessing from them, unseen")] = None,
    baseline_rows: Annotated[str | None, Option(help="a:b, only these rows of --baseline-data")] = None,
    batch_size: Annotated[int, Option(min=1, help="questions answered at once")] = 64,
    max_new_tokens: Annotated[int, Option(min=1, help="longest answer, in tokens")] = MAX_NEW_TOKENS,
    out: Annotated[Path | None, Option(help="JSON file for scores and answers")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="run the Python files in the exported folder")
    ] = False,
) -> None:
    """Scores an exported checkpoint on questions with short answers."""
    if baseline_rows and not baseline_data:
        raise UsageError("--baseline-rows chooses from --baseline-data; give both, or neither")
    chosen = parse_rows(rows)
    guessed_from = None
    if baseline_data:
        guessed_from = read_questions(baseline_data, parse_rows(baseline_rows, "--baseline-rows"))
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    result = evaluate(model, data, images, blind, rows=chosen, trust_remote_code=trust_remote_code, **options)
    for family, accuracy in result.per_family.items():
        print(f"{plain(family):12} {accuracy:.1%}")
    asked = count_text(result.num_questions, "question")
    print(f"{'all':12} {result.accuracy:.1%} of {asked}{', blind' if blind else ''}")
    if result.num_cut:
        print(f"{count_text(result.num_cut, 'answer')} cut short, perhaps wrong for that alone; raise --max-new-tokens")
    if result.found_as:
        path, found = next(iter(result.found_as.items()))
        images_found = count_text(len(result.found_as), "image")
        print(f"{images_found} found under another name than in the rows: {plain(path)} is {plain(found)}")
    if result.too_long:
        first = plain(repr(result.too_long[0].row_id))
        left_out = count_text(len(result.too_long), "question")
        print(f"{left_out} not asked, too long for the model's positions; first record {first}")
    more: dict[str, Any] = {"blind": blind}
    if guessed_from:
        more["baseline_accuracy"] = question_only_accuracy(guessed_from, [a.question for a in result.answers])
        print(f"{'baseline':12} {more['baseline_accuracy']:.1%} from the question alone")
    if out:
        write_result(result, out, **more)


if __name__ == "__main__":
    run(main)
