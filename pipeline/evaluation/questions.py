"""The questions in a LLaVA file, the answers a model gave, and how many are right.

Each question of a row stands on its own, with the row's images: what was asked before would give answers away ("what
color is the shape?", then "is there a red shape?"). An instruction that the first turn carries for the whole row, such
as LLaVA's "Answer the question using a single word or phrase.", goes with each of its questions.

An answer counts if it equals the expected one without regard to case and surrounding space.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from common.tokens import IMAGE_TOKEN
from data_prep.json_rows import Row
from data_prep.row_shapes import Refused, to_llava
from data_prep.source import open_rows

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Source: LLaVA-1.5, section 3.2."""


@dataclass(frozen=True)
class Question:
    """One question about the images of a row, the `row`-th of its file; `text` has no `<image>` in it."""

    row_id: str
    family: str
    images: tuple[str, ...]
    text: str
    expected: str
    row: int = 0

    @property
    def prompt(self) -> str:
        """The user turn: the row's images, then the question."""
        return f"{IMAGE_TOKEN * len(self.images)}\n{self.text}" if self.images else self.text


@dataclass(frozen=True)
class Answer:
    """What the model said to a question; `is_cut`: its longest answer was over before the answer was."""

    question: Question
    text: str
    is_cut: bool = False

    @property
    def correct(self) -> bool:
        """True if the answer is the expected one."""
        return _same(self.text) == _same(self.question.expected)


@dataclass(frozen=True)
class EvaluationResult:
    """The answers in the order of the data, and what fraction of them is right.

    `too_long` questions leave no position of the model for an answer. They were not asked and are not in the accuracy.
    `found_as` has the images that were found under another extension, or in the other Unicode form, by their paths.
    """

    answers: tuple[Answer, ...]
    too_long: tuple[Question, ...] = ()
    found_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_questions(self) -> int:
        """Questions asked."""
        return len(self.answers)

    @property
    def num_cut(self) -> int:
        """Answers that were cut; they are scored as far as they go."""
        return sum(answer.is_cut for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Right answers, 0..1."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def per_family(self) -> dict[str, float]:
        """The accuracy of each family of questions, by name; empty if the rows name none."""
        marks: dict[str, list[bool]] = defaultdict(list)
        for answer in self.answers:
            if answer.question.family:
                marks[answer.question.family].append(answer.correct)
        return {family: sum(marks[family]) / len(marks[family]) for family in sorted(marks)}


def read_questions(data: str | Path, chosen: slice = slice(None)) -> list[Question]:
    """Returns every question of the chosen rows (`a:b`, both counted from the front) of all that `make shards` takes.

    Raises:
        ValueError: the file cannot be read, a row is not a LLaVA row, or there is no question.
    """
    with open_rows(data, keep_images=False) as (rows, _):
        return questions_in(rows, data, chosen)


def questions_in(rows: Iterable[Row], name: object, chosen: slice) -> list[Question]:
    """Returns every question of the chosen rows of a file; `name` is what errors call it.

    Raises:
        ValueError: a row is not a LLaVA row, or there is no question.
    """
    questions: list[Question] = []
    for row in islice(rows, chosen.start, chosen.stop):
        if row.problem:
            raise ValueError(f"{name} index {row.index}: not a LLaVA row ({row.problem})")
        try:
            questions += _questions_of(row)
        except (Refused, TypeError, AttributeError) as error:
            raise ValueError(f"{name} index {row.index}: not a LLaVA row ({type(error).__name__}: {error})") from None
    if not questions:
        raise ValueError(f"{name}: no question in rows {chosen.start or 0}:{chosen.stop or ''}; choose other --rows")
    return questions


def _questions_of(found: Row) -> list[Question]:
    row, _ = to_llava(found.value)
    named = row.get("image") or []
    images = (named,) if isinstance(named, str) else tuple(named)
    pairs = [
        (question["value"], answer["value"])
        for question, answer in pairwise(row["conversations"])
        if (question["from"], answer["from"]) == ("human", "gpt")
    ]
    texts = [human.replace(IMAGE_TOKEN, "").strip() for human, _ in pairs]
    if texts and texts[0].endswith(f"\n{SHORT_ANSWER}"):
        texts = [text if text.endswith(SHORT_ANSWER) else f"{text}\n{SHORT_ANSWER}" for text in texts]
    family = str(row.get("family", ""))
    return [
        Question(str(row.get("id", "")), family, images, text, answer.strip(), found.index)
        for text, (_, answer) in zip(texts, pairs, strict=True)
    ]


def question_only_accuracy(train: Iterable[Question], test: Sequence[Question]) -> float:
    """Returns the accuracy on `test` of who never looks: the most frequent answer to that very question in `train`.

    For a question that `train` does not have, it is the most frequent answer of all.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.text][_same(question.expected)] += 1
    overall = sum(counts.values(), Counter()).most_common(1)[0][0]
    best = {text: counter.most_common(1)[0][0] for text, counter in counts.items()}
    return sum(best.get(question.text, overall) == _same(question.expected) for question in test) / len(test)


def _same(text: str) -> str:
    return text.strip().casefold()
