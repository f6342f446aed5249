r"""What a LLaVA row must be to be trained on, and the record it becomes in a shard.

A row as LLaVA writes it; `image` may be absent (text only), one path, or a list of paths::

    {"id": "000000790", "image": "coco/000000790.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cake."}]}

A row that breaks a rule is refused with a reason, never repaired: `check_row` names the rules. The shapes of other
trainers are no repair: `row_shapes` says which are taken for LLaVA's.
"""

import hashlib
import json
from typing import Any, NamedTuple

from common.console import count_text
from common.tokens import IMAGE_TOKEN
from data_prep.row_shapes import Refused, shown, to_llava

RESERVED_KEYS = ("sha256", "source_index", "source_shape")
DUPLICATE = "duplicate"
"""The kind of a refusal that tells nothing bad of the row."""
_ENCODERS = [
    json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    for sort_keys in (False, True)
]


class Reject(NamedTuple):
    """A refused row, as a line of rejects.jsonl tells it (which adds the name of the source)."""

    index: int
    id: str
    file: str | None
    kind: str
    reason: str


def refuse(index: int, row: Any, problem: Refused) -> Reject:
    """Returns the reject of row number `index`."""
    parts = (row_id(row, index), problem.file, problem.kind, str(problem))
    return Reject(index, *(part and part.encode(errors="backslashreplace").decode() for part in parts))  # type: ignore


def row_id(row: Any, index: int) -> str:
    """Returns the row's own id as text, or its index where it has none."""
    name = row.get("id") if isinstance(row, dict) else None
    return str(index if name is None else name)


class CheckedRow(NamedTuple):
    """A row in LLaVA's shape, its image paths in order, and how the source wrote what it wrote differently."""

    row: dict[str, Any]
    paths: tuple[str, ...]
    source_shape: dict[str, str]


def check_row(value: Any) -> CheckedRow:
    """Returns a row that can be trained on.

    The rules: there is a list of turns in which human and gpt take turns and gpt has the last word, after at most one
    opening system or gpt turn (the latter is what LLaVA skips); no human or gpt turn is empty; `<image>` stands in
    human turns only, once for every image path; image paths are relative and stay under the image root.

    Raises:
        Refused: The row breaks a rule.
    """
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"the row is {shown(value)}, not an object")
    if taken := [key for key in RESERVED_KEYS if key in value]:
        raise Refused("reserved_key", f"key {taken[0]!r} is set by the shards themselves")
    row, source_shape = to_llava(value)
    num_tokens = _check_turns(row["conversations"])
    paths = row.get("image")
    paths = [] if paths is None else paths if isinstance(paths, list) else [paths]
    for path in paths:
        check_path(path)
    if num_tokens != len(paths):
        tokens, files = count_text(num_tokens, f"{IMAGE_TOKEN} token"), count_text(len(paths), "image path")
        raise Refused("image_count", f"{tokens} but {files}")
    return CheckedRow(row, tuple(paths), source_shape)


def _check_turns(turns: list[dict[str, str]]) -> int:
    """Returns the number of `<image>` tokens in turns that are in order."""
    for number, turn in enumerate(turns):
        if not turn["value"].strip() and turn["from"] != "system":
            raise Refused("empty_turn", f"turn {number}, from {turn['from']}, is empty")
        if turn["from"] != "human" and IMAGE_TOKEN in turn["value"]:
            raise Refused("image_token", f"{IMAGE_TOKEN} in turn {number}, which is from {turn['from']}, not human")
    roles = [turn["from"] for turn in turns]
    body = roles[1:] if roles[0] in ("system", "gpt") else roles
    if not body or len(body) % 2 or any(role != ("human", "gpt")[i % 2] for i, role in enumerate(body)):
        told = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise Refused("turn_order", f"human and gpt must take turns, gpt last; found {told}")
    return sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)


def check_path(path: Any) -> None:
    """Makes sure that an image path names something under the image root.

    Raises:
        Refused: It does not.
    """
    if not isinstance(path, str) or not path or "\0" in path or not _is_utf8(path):
        raise Refused("image_path", f"image path is {shown(path)}, not a file name")
    if path.startswith(("/", "\\")) or path[1:3] in (":\\", ":/") or ".." in path.split("/"):
        raise Refused("image_path", "image path must be relative and stay under the image root", path)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def build_record(value: dict, index: int, images: list[dict]) -> bytes:
    """Returns the JSON of a record as shards hold it: the row, its place and hash in the source, and its images.

    `value` is the row as its source has it, of which the hash is taken; `source_shape` tells if it was not LLaVA's.

    Raises:
        Refused: The row holds what JSON or UTF-8 cannot hold.
    """
    digest = hashlib.sha256(canonical_json(value)).hexdigest()
    row, source_shape = to_llava(value)
    head = {"id": row_id(row, index), "source_index": index, "sha256": digest}
    head |= {"source_shape": source_shape} if source_shape else {}
    record = head | {"conversations": row["conversations"], "images": images}
    return json_bytes(record | {key: row[key] for key in sorted(row) if key not in record})


def canonical_json(row: dict) -> bytes:
    """Returns the one spelling of a row that its hash is taken of: keys sorted, no spaces, UTF-8."""
    return json_bytes(row, sort_keys=True)


def content_digest(checked: CheckedRow) -> bytes:
    """Returns 16 bytes that are equal for rows that say the same about the same image paths, whatever their ids."""
    told = [checked.paths, checked.row["conversations"]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()[:16]


def json_bytes(value: Any, sort_keys: bool = False) -> bytes:
    """Returns compact JSON in UTF-8.

    Raises:
        Refused: `value` holds NaN, Infinity or half of a surrogate pair.
    """
    try:
        return _ENCODERS[sort_keys].encode(value).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("text", "a text holds half of a surrogate pair (a broken \\u escape)") from None
    except ValueError:
        raise Refused("text", "a value is NaN or Infinity, which JSON does not have") from None
