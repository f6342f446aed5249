"""Samples with an image that does not decode: the run trains on without them, on every rank alike.

`data.max_bad_samples` bounds how many different samples of the run may be such. They stand in `bad-samples.jsonl` of
the run folder with the step that met them first; a run that goes on from an earlier step meets the later ones again.
"""

import json
from collections.abc import Collection
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from model.pack import IGNORE_INDEX
from pipeline.data.batches import GlobalBatch, MicroBatch

FILE = "bad-samples.jsonl"


def read_bad_samples(run_dir: Path, step: int) -> dict[int, str]:
    """Returns the samples, with what is wrong with them, that the first `step` steps of a run left out."""
    file = run_dir / FILE
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {item["sample"]: item["reason"] for item in found if item["step"] <= step}


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
    """Writes down the `new` ones of the known bad samples, if they are not too many.

    Raises:
        ValueError: They are; on every process.
    """
    if len(known) > limit:
        raise ValueError(
            f"step {step}: {known[max(new)]}; with it {len(known)} samples are bad, and data.max_bad_samples={limit}. "
            "Mend them, or raise the setting: the same command goes on"
        )
    if torch.distributed.get_rank() == 0:
        with (run_dir / FILE).open("a") as file:
            for number in new:
                file.write(json.dumps({"step": step, "sample": number, "reason": known[number]}) + "\n")


def leave_out(batch: GlobalBatch, numbers: Collection[int], num_targets: int) -> GlobalBatch:
    """Returns a batch in which these samples of the whole batch, with so many targets, have none."""
    counts = replace(
        batch.counts,
        num_samples=batch.counts.num_samples - len(numbers),
        num_bad_samples=len(numbers),
        num_targets=batch.counts.num_targets - num_targets,
    )
    return replace(batch, counts=counts, micro_batches=[_without(each, numbers) for each in batch.micro_batches])


def _without(micro_batch: MicroBatch, numbers: Collection[int]) -> MicroBatch:
    pack = micro_batch.pack
    targets_T = pack.targets_T.clone()
    rows = pairwise(accumulate(pack.text_lengths, initial=0))
    for number, (start, end) in zip(micro_batch.numbers, rows, strict=False):  # padding is behind the samples
        if number in numbers:
            targets_T[start:end] = IGNORE_INDEX
    return replace(micro_batch, pack=replace(pack, targets_T=targets_T))
