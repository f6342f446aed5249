"""Fixed records that take every branch of encoding: a digest of what becomes of them tells when the encoding changes.

The length table of a shard set is kept under a name that holds this digest, so that a table made by other code, by
another version of a library or for another shape of records is never found.
"""

import hashlib
import json
from dataclasses import fields

import numpy as np

from pipeline.data.samples import Sample, build_sample
from pipeline.data.templates import ConversationError, SpecialTokens, Tokenizer

SHORT = 40  # positions: where most of the records below are cut


def _record(*turns: str, opening: str | None = None) -> dict:
    """Returns a record as a shard has it: turns of human and gpt, behind an opening turn of another role if any."""
    roles = [opening] if opening else []
    roles += ["human", "gpt"] * len(turns)
    said = [{"from": role, "value": text} for role, text in zip(roles, turns, strict=False)]
    num_images = sum(text.count("<image>") for text in turns)
    images = [{"member": f"{i}.jpg", "path": f"{i}.jpg", "format": "JPEG"} for i in range(num_images)]
    return {"id": "probe", "source_index": 0, "conversations": said, "images": images}


PROBES = (
    _record("<image>\nWhat is this?", "A cat on a mat."),
    _record("What is this? <image>  ", " 3 cats,\n\n  and 1 dog  "),
    _record("<image> and <image>: the same?", "No."),
    _record("Tell a story.", "Once upon a time " * 20, "Go on.", "The end."),
    _record("  <image>\n\tIndent?", "\u65e5\u672c\u8a9e \U0001f642 e\u0301 \u00a0x \u2581y", "1+1=?", "2"),
    _record("A greeting.", "<image>\nSo?", "Yes.", opening="gpt"),
    _record("Be brief.", "a", "b", opening="system"),
    _record("</s> <s> <unk> <pad> <|endoftext|> <|im_end|> <|eot_id|>", "[INST] </s>"),
    _record("Why?", "Because ASSISTANT: said so."),
    _record("", "nothing"),
    _record("one turn"),
)


def encoding_digest(
    template: str,
    tokenizer: Tokenizer,
    num_visual_tokens_per_image: int,
    max_positions: int,
    special_tokens: SpecialTokens,
) -> str:
    """Returns a digest of the samples that the probes become, and of why those that become none do not."""
    digest = hashlib.sha256(json.dumps(PROBES).encode())
    for record in PROBES:
        for limit in (max_positions, min(max_positions, SHORT)):
            try:
                sample = build_sample(record, template, tokenizer, num_visual_tokens_per_image, limit, special_tokens)
            except ConversationError as error:
                digest.update(str(error).encode())
                continue
            digest.update(json.dumps(_plain(sample)).encode())
    return digest.hexdigest()


def _plain(sample: Sample) -> dict[str, list[int] | int]:
    return {field.name: np.asarray(getattr(sample, field.name)).tolist() for field in fields(sample)}
