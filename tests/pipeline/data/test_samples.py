"""Positions, targets and cuts against the full sequence written out token by token."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaTokenizerFast

from common.console import UsageError
from pipeline.data.samples import Sample, build_sample
from pipeline.data.templates import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConversationError, encode_conversation
from tests.pipeline.data.test_templates import byte_level, talk


def record(conversations: list[dict], num_images: int) -> dict:
    images = [{"member": f"{number}.jpg"} for number in range(num_images)]
    return {"id": "cat-7", "source_index": 42, "conversations": conversations, "images": images}


def written_out(row: dict, template: str, tokenizer, v: int, limit: int) -> dict:
    """The same sample, from a list with one entry per position: (token, label, image number)."""
    encoded = encode_conversation(row["conversations"], bool(row["images"]), template, tokenizer)
    full, number = [], 0
    for token, label in zip(encoded.token_ids, encoded.labels, strict=True):
        if token == IMAGE_TOKEN_INDEX:
            full += [(None, IGNORE_INDEX, number)] * v
            number += 1
        else:
            full.append((token, label, None))
    kept = full[:limit]
    while kept and kept[-1][0] is None:
        kept.pop()
    text = [(p, token) for p, (token, _, _) in enumerate(kept) if token is not None]
    after = [*kept[1:], (None, IGNORE_INDEX, None)]
    numbers = [image for _, _, image in kept if image is not None]
    return {
        "text_token_ids": [token for _, token in text],
        "text_positions": [p for p, _ in text],
        "targets": [after[p][1] for p, _ in text],
        "image_positions": [[image for _, _, image in kept].index(n) for n in sorted(set(numbers))],
        "image_indices": sorted(set(numbers)),
        "num_targets": sum(after[p][1] != IGNORE_INDEX for p, _ in text),
        "num_dropped_targets": sum(
            kept[p - 1][0] is None and kept[p][1] != IGNORE_INDEX for p in range(1, len(kept)) if kept[p][0] is not None
        ),
        "num_truncated_tokens": sum(token is not None for token, _, _ in full) - len(text),
    }


def as_lists(sample: Sample) -> dict:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(sample).items()}


def test_one_caption_by_hand():
    tokenizer = byte_level()
    bos, a, cat, newline = (tokenizer.encode(text, add_special_tokens=False) for text in ("<s>", "a", " cat", "\n"))
    sample = build_sample(record(talk("<image>\nWhat?", "a cat"), 1), "plain", tokenizer, 3, 2048)
    ids = bos + a + cat + newline
    assert sample.text_token_ids.tolist() == ids
    assert sample.text_positions.tolist() == [0, *range(4, 3 + len(ids))]
    assert sample.targets.tolist() == [IGNORE_INDEX, *cat, *newline, IGNORE_INDEX]
    assert (sample.image_positions.tolist(), sample.image_indices.tolist()) == ([1], [0])
    assert (sample.num_targets, sample.num_dropped_targets, sample.num_truncated_tokens) == (len(cat) + 1, 1, 0)


def test_text_only():
    sample = build_sample(record(talk("red?", "yes"), 0), "v1", byte_level(), 576, 2048)
    assert sample.text_positions.tolist() == list(range(len(sample.text_token_ids)))
    assert len(sample.image_positions) == len(sample.image_indices) == sample.num_dropped_targets == 0
    assert sample.num_targets == (sample.targets != IGNORE_INDEX).sum() > 0


@pytest.mark.parametrize("seed", range(40))
def test_samples_equal_the_sequence_written_out(seed):
    rng, tokenizer = random.Random(seed), byte_level()
    num_turns = rng.choice([2, 2, 4, 6])
    texts = [
        "".join(rng.choice(["<image>", " red", "is it ", "\n"]) for _ in range(rng.randint(1, 5)))
        for _ in range(num_turns)
    ]
    texts[1::2] = [text.replace("<image>", "yes") for text in texts[1::2]]
    row = record(talk(*texts), sum(text.count("<image>") for text in texts))
    v, limit = rng.choice([1, 4, 9]), rng.choice([5, 150, 170, 190, 2048])
    expected = written_out(row, "v1", tokenizer, v, limit)
    assert as_lists(build_sample(row, "v1", tokenizer, v, limit)) == expected


def test_cut_images_that_no_text_follows_are_dropped():
    """Ten positions per image; the second image lies across the limit, the third behind it."""
    tokenizer = byte_level("llama_3")
    row = record(talk("<image> a <image> b <image> c", "yes"), 3)
    whole = build_sample(row, "mistral", tokenizer, 10, 2048)
    first, second, third = whole.image_positions.tolist()
    assert whole.image_indices.tolist() == [0, 1, 2] and whole.num_truncated_tokens == 0
    cut = build_sample(row, "mistral", tokenizer, 10, second + 5)
    assert cut.image_positions.tolist() == [first] and cut.image_indices.tolist() == [0]
    assert cut.text_positions[-1] == second - 1
    assert cut.num_truncated_tokens == len(whole.text_token_ids) - len(cut.text_token_ids) > 0
    assert cut.num_targets == 0  # the answer is gone: counted, not refused
    just = build_sample(row, "mistral", tokenizer, 10, second + 11)
    assert just.image_indices.tolist() == [0, 1] and just.text_positions[-1] == second + 10
    assert build_sample(row, "mistral", tokenizer, 10, third + 10).image_indices.tolist() == [0, 1]


def test_a_target_behind_the_limit_is_not_learned():
    tokenizer = byte_level()
    row = record(talk("red?", "yes it is"), 0)
    whole = build_sample(row, "v1", tokenizer, 1, 2048)
    cut = build_sample(row, "v1", tokenizer, 1, len(whole.text_token_ids) - 1)
    assert cut.targets[-1] == IGNORE_INDEX and whole.targets[-2] == tokenizer.eos_token_id
    assert (cut.num_targets, cut.num_truncated_tokens) == (whole.num_targets - 1, 1)


def test_real_rows(realdata: Path):
    """LLaVA shifts labels by one in the full sequence; all of its targets but the ones after an image are ours."""
    tokenizer = LlamaTokenizerFast.from_pretrained(realdata / "tokenizers" / "mistral_v1_hf")
    counts = {}
    for name, template in (("llava_pretrain", "plain"), ("llava_instruct", "v1")):
        rows = json.loads((realdata / "coco_photos" / f"{name}.json").read_text())
        samples = [build_sample(row | {"images": [{}]}, template, tokenizer, 576, 2048) for row in rows]
        counts[name] = sum(one.num_targets for one in samples), sum(one.num_dropped_targets for one in samples)
        assert all(one.num_truncated_tokens == 0 and len(one.image_indices) == 1 for one in samples)
    assert counts == {"llava_pretrain": (533 - 39, 39), "llava_instruct": (2710, 0)}


@pytest.mark.parametrize(
    ("conversations", "num_images", "message"),
    [
        (talk("<image>\na", "b"), 2, "1 <image> token left in the text but 2 images"),
        (talk("a", "b"), 1, "0 <image> tokens left in the text but 1 image"),
        (talk("<image>", "b", first="gpt") + talk("c"), 1, "human and gpt must take turns"),
        (talk("a </s>", "b"), 0, "a turn contains '</s>', a special token"),
    ],
)
def test_a_record_at_fault_is_named(conversations, num_images, message):
    with pytest.raises(ConversationError, match=rf"^record cat-7 \(index 42\): .*{message}"):
        build_sample(record(conversations, num_images), "v1", byte_level(), 4, 2048)


def test_no_text_within_the_limit():
    row = record(talk("<image>", "b"), 1)
    with pytest.raises(ConversationError, match="max_positions=4; raise it"):
        build_sample(row, "plain", byte_level(bos=False), 4, 4)


def test_an_unknown_template_is_not_the_fault_of_the_record():
    with pytest.raises(UsageError):
        build_sample(record(talk("a", "b"), 0), "v0", byte_level(), 4, 2048)
