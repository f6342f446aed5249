r"""What a LLaVA row must be to be trained on, and the record it becomes in a shard.

A row as LLaVA writes it; `image` may be absent (text only), one path, or a list of paths::

    {"id": "000000790", "image": "coco/000000790.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cake."}]}

A row that breaks a rule is refused with a reason, never repaired: `check_row` names the rules.
"""

import hashlib
import json
from typing import Any, NamedTuple

IMAGE_TOKEN = "<image>"
RESERVED_KEYS = ("images", "sha256", "source_index")
DUPLICATE = "duplicate"
"""The kind of a refusal that tells nothing bad of the row."""
_ENCODERS = [
    json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    for sort_keys in (False, True)
]


class Refused(ValueError):
    """A row that cannot be trained on: `kind` groups equal problems, `file` is the image at fault, if one is."""

    def __init__(self, kind: str, reason: str, file: str | None = None):
        """The message is `reason`."""
        super().__init__(reason)
        self.kind, self.file = kind, file


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


def check_row(row: Any) -> tuple[str, ...]:
    """Returns the image paths of a row, in order.

    The rules: `conversations` is a list of {"from", "value"} in which human and gpt take turns and gpt has the last
    word, after at most one opening system or gpt turn (the latter is what LLaVA skips); `<image>` stands in human
    turns only, once for every image path; image paths are relative and stay under the image root.

    Raises:
        Refused: The row breaks a rule.
    """
    if not isinstance(row, dict):
        raise Refused("not_an_object", f"the row is {_shown(row)}, not an object")
    if taken := [key for key in RESERVED_KEYS if key in row]:
        raise Refused("reserved_key", f"key {taken[0]!r} is set by the shards themselves; image paths go in 'image'")
    num_tokens = _check_conversations(row.get("conversations"))
    paths = row.get("image")
    paths = [] if paths is None else paths if isinstance(paths, list) else [paths]
    for path in paths:
        check_path(path)
    if num_tokens != len(paths):
        tokens, files = _count(num_tokens, f"{IMAGE_TOKEN} token"), _count(len(paths), "image path")
        raise Refused("image_count", f"{tokens} but {files}")
    return tuple(paths)


def _check_conversations(turns: Any) -> int:
    """Returns the number of `<image>` tokens in a well-formed list of turns."""
    if not isinstance(turns, list) or not turns:
        raise Refused("conversations", f"'conversations' is {_shown(turns)}, not a list of turns")
    for number, turn in enumerate(turns):
        if not (isinstance(turn, dict) and isinstance(turn.get("value"), str)):
            raise Refused("turn", f"turn {number} is not {{'from': role, 'value': text}}")
        if turn.get("from") not in ("human", "gpt", "system"):
            raise Refused("role", f"turn {number} is from {_shown(turn.get('from'))}; use human, gpt or system")
        if turn["from"] != "human" and IMAGE_TOKEN in turn["value"]:
            raise Refused("image_token", f"{IMAGE_TOKEN} in turn {number}, which is from {turn['from']}, not human")
    roles = [turn["from"] for turn in turns]
    body = roles[1:] if roles[0] in ("system", "gpt") else roles
    if not body or len(body) % 2 or any(role != ("human", "gpt")[i % 2] for i, role in enumerate(body)):
        shown = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise Refused("turn_order", f"human and gpt must take turns, gpt last; found {shown}")
    return sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)


def check_path(path: Any) -> None:
    """Makes sure that an image path names something under the image root.

    Raises:
        Refused: It does not.
    """
    if not isinstance(path, str) or not path or "\0" in path or not _is_utf8(path):
        raise Refused("image_path", f"image path is {_shown(path)}, not a file name")
    if path.startswith(("/", "\\")) or path[1:3] in (":\\", ":/") or ".." in path.split("/"):
        raise Refused("image_path", "image path must be relative and stay under the image root", path)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def build_record(row: dict, index: int, images: list[dict]) -> bytes:
    """Returns the JSON of a record as shards hold it: the row, its place and hash in the source, and its images.

    Raises:
        Refused: The row holds what JSON or UTF-8 cannot hold.
    """
    digest = hashlib.sha256(canonical_json(row)).hexdigest()
    head = {"id": row_id(row, index), "source_index": index, "sha256": digest}
    record = head | {"conversations": row["conversations"], "images": images}
    return json_bytes(record | {key: row[key] for key in sorted(row) if key not in record})


def canonical_json(row: dict) -> bytes:
    """Returns the one spelling of a row that its hash is taken of: keys sorted, no spaces, UTF-8."""
    return json_bytes(row, sort_keys=True)


def content_digest(row: dict) -> bytes:
    """Returns 16 bytes that are equal for rows that say the same about the same image paths, whatever their ids."""
    return hashlib.sha256(json.dumps([row.get("image"), row["conversations"]], sort_keys=True).encode()).digest()[:16]


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
