"""What one rank sees at a step, as text in spans and as a page: `describe`, `page`."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

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
        f"step {step} (epoch {plan.epoch}): {counts.num_samples} samples, {counts.num_skipped} skipped, "
        f"{counts.num_text_tokens:,} text tokens, {counts.num_targets:,} of them targets, "
        f"{counts.num_visual_tokens:,} visual tokens, {counts.num_padding_tokens:,} rows of padding, "
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


PAGE = """<!doctype html><meta charset="utf-8"><title>{{ headline }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap; font: inherit } img { height: 12rem; margin-right: .5rem }
.target { background: #bdf5c0; color: #000 } .image { color: #a0a }
</style>
<h1>{{ headline }}</h1>
<p>Marked words are the targets: what the model is trained to say.</p>
{% for name, spans, images in samples %}
<h2>{{ name }}</h2>
{% for image in images %}<img src="data:image/png;base64,{{ image }}" alt="image {{ loop.index }}">{% endfor %}
<pre>{% for kind, words in spans %}<span class="{{ kind }}">{{ words }}</span>{% endfor %}</pre>
{% endfor %}
"""


def page(sources: list[BatchSource], step: int) -> str:
    """Returns a self-contained HTML page of what the ranks of `sources` see at a step."""
    samples: list[Any] = [
        (name, spans, [png(image) for image in images])
        for source in sources
        for name, spans, images in describe(source, step)
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(headline=headline(sources[0], step), samples=samples)


def png(image_HW3: np.ndarray) -> str:
    """Returns an image as a base64 PNG."""
    stream = io.BytesIO()
    Image.fromarray(image_HW3).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
