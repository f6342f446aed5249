"""What one rank sees at a step, as text in spans and as a page: `describe`, `page`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.console import count_text
from common.pages import image_url, render_page
from model.pack import IGNORE_INDEX
from pipeline.data.batches import BatchSource, MicroBatch
from pipeline.data.templates import Tokenizer

Span = tuple[str, str]
"""A kind (`text`, `target` or `image`) and the words."""


def headline(source: BatchSource, step: int) -> str:
    """Returns one line about the whole global batch."""
    plan = source.schedule.plan(step)
    counts = plan.counts
    return (
        f"step {step} (epoch {plan.epoch}): {count_text(counts.num_samples, 'sample')}, {counts.num_skipped} skipped, "
        f"{count_text(counts.num_text_tokens, 'text token')}, {counts.num_targets:,} of them to learn, "
        f"{count_text(counts.num_visual_tokens, 'visual token')}, "
        f"{count_text(counts.num_padding_tokens, 'padding row')}, "
        f"imbalance {counts.imbalance_fraction:.1%}"
    )


def describe(source: BatchSource, step: int) -> Iterator[tuple[str, list[Span], list[np.ndarray]]]:
    """Yields each sample of a rank's packs: its name, its text in spans, its images as uint8[H, W, 3]."""
    plan, rank = source.schedule.plan(step), source.coordinates.dp_rank
    batch = source[step]
    for number, (micro_batch, pack) in enumerate(zip(batch.micro_batches, plan.packs[rank], strict=False)):
        images = iter(micro_batch.pixels_B3HW.permute(0, 2, 3, 1).numpy())
        for sample, spans in zip(pack, sample_spans(micro_batch, source.tokenizer), strict=False):
            shards, local = source.samples.locate(sample)
            record = shards.record(local)
            name = (
                f"rank {rank}, pack {number + 1} of {len(batch.micro_batches)}: sample {sample} of "
                f"{shards.location}, record {record['id']} (index {record['source_index']})"
            )
            yield name, spans, [next(images) for kind, _ in spans if kind == "image"]


def sample_spans(micro_batch: MicroBatch, tokenizer: Tokenizer) -> Iterator[list[Span]]:
    """Yields the text of each sample in a pack, cut into spans of what is and is not a target, with its images."""
    pack = micro_batch.pack
    parts = (pack.token_ids_T, pack.positions_T, pack.targets_T)
    texts = zip(*(part.split(pack.text_lengths) for part in parts), strict=True)
    for (ids, positions, targets), images in zip(texts, pack.image_positions.split(pack.image_counts), strict=True):
        learned = [False, *(targets[:-1] != IGNORE_INDEX).tolist()]
        kinds = ["target" if is_target else "text" for is_target in learned]
        tokens = list(zip(positions.tolist(), kinds, ids.tolist(), strict=True))
        tokens += [(position, "image", -1) for position in images.tolist()]
        yield merge_spans(sorted(tokens), tokenizer)


def merge_spans(tokens: list[tuple[int, str, int]], tokenizer: Tokenizer) -> list[Span]:
    """Returns runs of one kind as one span, decoded. `tokens` holds (position, kind, token id) in order."""
    spans: list[tuple[str, list[int]]] = []
    for _, kind, token in tokens:
        if spans and spans[-1][0] == kind != "image":
            spans[-1][1].append(token)
        else:
            spans.append((kind, [token]))
    return [(kind, "<image>" if kind == "image" else tokenizer.decode(ids)) for kind, ids in spans]


def marked(span: Span) -> tuple[str, str]:
    """Returns a span as the terminal shows it: what is to be learned in green and in brackets."""
    kind, words = span
    return (f"[{words}]", "green") if kind == "target" else (words, "magenta" if kind == "image" else "")


def page(sources: list[BatchSource], step: int) -> str:
    """Returns a self-contained HTML page of what the ranks of `sources` see at a step."""
    samples: list[Any] = [
        (name, spans, [image_url(Image.fromarray(image)) for image in images])
        for source in sources
        for name, spans, images in describe(source, step)
    ]
    template = Path(__file__).with_name("preview.html.jinja")
    return render_page(template, headline=headline(sources[0], step), samples=samples)
