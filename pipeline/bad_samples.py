"""Samples with an image that does not decode: the run trains on without them, on every rank alike.

`data.max_bad_samples` bounds how many different samples of the run may be such. They stand in `bad-samples.jsonl` of
the run folder with the step that met them first; a run that goes on from an earlier step meets the later ones again.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from common.console import count_text
from common.files import read_whole, write_whole
from model.pack import IGNORE_INDEX
from pipeline.data.batches import GlobalBatch, MicroBatch
from pipeline.distributed import broadcast_from_rank0

FILE = "bad-samples.jsonl"


class BadSample(BaseModel):
    """A line of the file: a sample by its number in the mixture, and the step, counted from 1, that met it first."""

    step: int
    sample: int
    reason: str


def read_bad_samples(run_dir: Path, step: int) -> dict[int, str]:
    """Returns the samples, with what is wrong with them, that the first `step` steps of a run left out.

    Raises:
        ValueError: The file that lists them is damaged.
    """
    return {found.sample: found.reason for found in _read(run_dir / FILE) if found.step <= step}


def _read(file: Path) -> list[BadSample]:
    if not file.is_file():
        return []
    whole = [line for line in read_whole(file).splitlines() if line.endswith(b"}")]  # not what a full disk cut short
    try:
        return [BadSample.model_validate_json(line) for line in whole]
    except ValidationError as error:
        raise ValueError(
            f"{file}: damaged ({error.errors()[0]['msg']}); remove its broken lines, then start again"
        ) from error


def gather_bad_samples(mine: dict[int, str], device: torch.device) -> dict[int, str]:
    """Returns, on every process, the bad samples that all have met. A step without any sends one number."""
    count = torch.tensor(len(mine), device=device)
    torch.distributed.all_reduce(count)
    if not count:
        return {}
    parts: list[dict[int, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return dict(sorted({number: reason for part in parts for number, reason in part.items()}.items()))


def check_bad_samples(known: dict[int, str], limit: int, run_dir: Path, step: int, new: Collection[int]) -> None:
    """Writes down the `new` ones of the known bad samples, if they are not too many. All processes call it.

    Raises:
        ValueError: They are; on every process.
        OSError: They cannot be written; on every process.
    """
    if len(known) > limit:
        raise ValueError(
            f"step {step}: {known[max(new)]}; with it the run has {count_text(len(known), 'bad sample')}, and "
            f"data.max_bad_samples={limit}. "
            "Mend them, or raise the setting: the same command goes on"
        )
    added = [BadSample(step=step, sample=number, reason=known[number]) for number in new]
    broadcast_from_rank0(lambda: _write(run_dir / FILE, known, added))


def _write(file: Path, known: Collection[int], added: list[BadSample]) -> None:
    """Writes the file anew, without what a run before this one met in later steps."""
    new = {found.sample for found in added}
    kept = [found for found in _read(file) if found.sample in known and found.sample not in new]
    write_whole(file, "".join(f"{found.model_dump_json()}\n" for found in [*kept, *added]).encode())


def leave_out(batch: GlobalBatch, numbers: Sequence[int], num_targets: int) -> GlobalBatch:
    """Returns a batch in which these samples of the whole batch, with so many targets, have none.

    A sample stands in `numbers`, and counts, as often as in the batch.
    """
    counts = replace(
        batch.counts,
        num_samples=batch.counts.num_samples - len(numbers),
        num_bad_samples=len(numbers),
        num_targets=batch.counts.num_targets - num_targets,
    )
    left_out = set(numbers)
    return replace(batch, counts=counts, micro_batches=[_without(each, left_out) for each in batch.micro_batches])


def _without(micro_batch: MicroBatch, numbers: Collection[int]) -> MicroBatch:
    pack = micro_batch.pack
    targets_T = pack.targets_T.clone()
    rows = pairwise(accumulate(pack.text_lengths, initial=0))
    for number, (start, end) in zip(micro_batch.numbers, rows, strict=False):  # padding is behind the samples
        if number in numbers:
            targets_T[start:end] = IGNORE_INDEX
    return replace(micro_batch, pack=replace(pack, targets_T=targets_T))
