"""How long every sample is, known before any is read for training: the length table.

It is computed once for a shard set, a tokenizer and a template, in parallel, and kept in the cache folder under a name
that tells all it depends on, the encoding code too (`pipeline.data.probes`). With it the packs of every step of a run
are a pure function of the step.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TimeRemainingColumn

from common.console import build_progress, count_text
from common.files import read_whole, write_whole
from model import hf_read
from pipeline.data.probes import encoding_digest
from pipeline.data.samples import Sample, build_sample
from pipeline.data.templates import ConversationError, SpecialTokens, Tokenizer
from pipeline.distributed import init_worker_signals, worker_context
from pipeline.fingerprints import tokenizer_fingerprint

if TYPE_CHECKING:  # the readers of shards, and streaming with them, are for whoever opens some
    from pipeline.shards.shard_set import ShardSet

COLUMNS = ("num_text", "num_images", "num_targets", "num_dropped_targets", "num_truncated_tokens")
DIGEST_BYTES = hashlib.sha256().digest_size
SAMPLES_PER_PROCESS = 20_000  # fewer are encoded sooner than a process has imported what it needs


@dataclass(frozen=True)
class Encoding:
    """All that decides how a record becomes tokens. `tokenizer` is the folder it is loaded from."""

    tokenizer: Path
    template: str
    num_tokens_per_image: int
    max_positions: int
    special_tokens: SpecialTokens = "refuse"

    def fingerprint(self) -> str:
        """Returns a digest that changes when any sample's length may."""
        settings = (self.num_tokens_per_image, self.max_positions, self.special_tokens)
        behaviour = encoding_digest(self.template, load_tokenizer(self.tokenizer), *settings)
        facts = [COLUMNS, tokenizer_fingerprint(self.tokenizer), self.template, *settings, behaviour]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class LengthTable:
    """One row a sample: `values` is int32[num_samples, 5] with the `COLUMNS`; a sample without text has a problem."""

    values: np.ndarray
    problems: dict[int, str]

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> np.ndarray:
        """Returns int32[num_samples], one of `COLUMNS`."""
        return self.values[:, COLUMNS.index(name)]

    def without_targets(self) -> np.ndarray:
        """Returns int64[n], the samples that have text but nothing to learn."""
        return np.flatnonzero((self.column("num_text") > 0) & (self.column("num_targets") == 0))

    def check(self, number: int, sample: Sample, name: str) -> None:
        """Makes sure that a sample is what the table says of it.

        Raises:
            ValueError: It is not, so the plan of the run is wrong; the message has the sample's `name`.
        """
        for column, found, planned in zip(COLUMNS, sample.sizes(), self.values[number].tolist(), strict=True):
            if found != planned:
                raise ValueError(f"{name} has {column}={found}, but the length table says {planned}")


def join(tables: Sequence[LengthTable]) -> LengthTable:
    """Returns the table of several shard sets, whose samples are numbered through."""
    starts = np.cumsum([0, *(len(table) for table in tables)])
    problems = {
        int(start) + n: text for start, table in zip(starts, tables, strict=False) for n, text in table.problems.items()
    }
    return LengthTable(np.concatenate([table.values for table in tables]), problems)


def length_table(shards: "ShardSet", encoding: Encoding, cache: Path, console: Console) -> LengthTable:
    """Returns the length table of a shard set, from the cache or computed and put there, showing progress."""
    name = hashlib.sha256(f"{shards.fingerprint} {encoding.fingerprint()}".encode()).hexdigest()[:24]
    file = cache / f"lengths-{name}.npz"
    if file.is_file():
        return _load(file, len(shards))
    columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeRemainingColumn())
    with build_progress(console, *columns, transient=True) as progress:
        task = progress.add_task(f"token lengths of {shards.location}", total=len(shards))
        parts = []
        for part in _measure_all(shards, encoding):
            parts.append(part)
            progress.advance(task, len(part))
    table = join(parts)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(file, _dump(table))
    return table


def _measure_all(shards: "ShardSet", encoding: Encoding) -> Iterator[LengthTable]:
    """Yields the table of each shard in turn."""
    jobs = [(shards, encoding, shard) for shard in range(len(shards.shard_sizes))]
    num_processes = min(len(os.sched_getaffinity(0)), len(jobs), len(shards) // SAMPLES_PER_PROCESS)
    if num_processes < 2:
        yield from map(measure_shard, jobs)
        return
    with ProcessPoolExecutor(num_processes, worker_context(), init_worker_signals) as pool:
        yield from pool.map(measure_shard, jobs)


def measure_shard(job: "tuple[ShardSet, Encoding, int]") -> LengthTable:
    """Returns the table of one shard."""
    shards, encoding, shard = job
    return measure(shards.records(shard), encoding, load_tokenizer(encoding.tokenizer))


def measure(records: Iterable[dict], encoding: Encoding, tokenizer: Tokenizer) -> LengthTable:
    """Returns the table of some records."""
    rows, problems = [], {}
    for number, record in enumerate(records):
        try:
            sample = build_sample(
                record,
                encoding.template,
                tokenizer,
                encoding.num_tokens_per_image,
                encoding.max_positions,
                encoding.special_tokens,
            )
            rows.append(sample.sizes())
        except ConversationError as error:
            rows.append((0,) * len(COLUMNS))
            problems[number] = str(error)
    return LengthTable(np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), problems)


@cache
def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a base folder."""
    return hf_read.load_tokenizer(folder)


def _dump(table: LengthTable) -> bytes:
    """Returns a table as an archive of arrays, whose comment is the SHA-256 of all before it."""
    stream = io.BytesIO()
    problems = np.frombuffer(json.dumps(list(table.problems.items())).encode(), dtype=np.uint8)
    np.savez_compressed(stream, values=table.values, problems=problems)
    with ZipFile(stream, "a") as archive:
        archive.comment = bytes(DIGEST_BYTES)
    body = stream.getvalue()[:-DIGEST_BYTES]
    return body + hashlib.sha256(body).digest()


def _load(file: Path, num_samples: int) -> LengthTable:
    data = read_whole(file)
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{file} is damaged (its checksum is wrong); delete it, and it is computed again")
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        table = LengthTable(stored["values"], dict(json.loads(stored["problems"].tobytes())))
    if len(table) != num_samples:
        raise ValueError(f"{file} knows {count_text(len(table), 'sample')}, the shards hold {num_samples}; delete it")
    return table
