r"""Rows in the shapes of several trainers, made into LLaVA's; what was different is told.

    {"messages": [{"role": "user", "content": "<image>how many?"},
                  {"role": "assistant", "content": 3}], "images": ["a.jpg"]}

    {"conversations": [{"from": "human", "value": "<image>how many?"},
                       {"from": "gpt", "value": "3"}], "image": ["a.jpg"]}
    {"turns": "messages", "role": "role", "text": "content", "user": "human", ...}   what `to_llava` returns beside it

A content may also be a list of parts, `{"type": "text", "text": ...}` and `{"type": "image"}` with or without a path.
A row of LLaVA's own shape stays the object that it is.
"""

import json
from typing import Any

from common.tokens import IMAGE_TOKEN


class Refused(ValueError):
    """A row that cannot be trained on: `kind` groups equal problems, `file` is the image at fault, if one is."""

    def __init__(self, kind: str, reason: str, file: str | None = None):
        """The message is `reason`."""
        super().__init__(reason)
        self.kind, self.file = kind, file


ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
OTHER_MEDIA = {"video": ("video", "videos"), "audio": ("audio", "audios")}


def to_llava(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a row as LLaVA would write it, and how the source wrote what differs; empty for a row of LLaVA's.

    Raises:
        Refused: It has no turns, says the same thing twice, or holds a video or sound.
    """
    shape: dict[str, str] = {}
    for kind, keys in OTHER_MEDIA.items():
        if found := [key for key in keys if row.get(key)]:
            raise Refused(kind, f"the row has {found[0]!r}; only images and text can be trained on")
    turns_key = _only(row, ("conversations", "messages"), "conversations", shape, "turns")
    image_key = _only(row, ("image", "images"), "image_keys", shape, "images")
    turns = row.get(turns_key)
    if not isinstance(turns, list) or not turns:
        raise Refused("conversations", f"{turns_key!r} is {shown(turns)}, not a list of turns")
    paths: list[Any] = []
    turns = [_turn(number, turn, shape, paths) for number, turn in enumerate(turns)]
    images = row.get(image_key)
    if paths:
        if images:
            raise Refused("image_keys", f"image paths stand both in the turns and in {image_key!r}")
        images, shape["images"] = paths, "parts"
    if not shape:
        return row, shape
    others = {key: value for key, value in row.items() if key not in (turns_key, image_key)}
    return others | ({} if images is None else {"image": images}) | {"conversations": turns}, shape


def _only(row: dict, keys: tuple[str, str], kind: str, shape: dict[str, str], what: str) -> str:
    """Returns which of two keys the row has, LLaVA's being the first."""
    given = [key for key in keys if row.get(key)]
    if len(given) > 1:
        raise Refused(kind, f"the row has both {keys[0]!r} and {keys[1]!r}; keep one")
    key = next((key for key in [*given, *keys] if key in row), keys[0])
    if key != keys[0]:
        shape[what] = key
    return key


def _turn(number: int, turn: Any, shape: dict[str, str], paths: list[Any]) -> dict[str, Any]:
    """Returns a turn as {"from", "value"} with what else it holds; adds what differs, and its images to the others."""
    if not isinstance(turn, dict):
        raise Refused("turn", f"turn {number} is {shown(turn)}, not {{'from': role, 'value': text}}")
    role_key = _only(turn, ("from", "role"), "turn", shape, "role")
    text_key = _only(turn, ("value", "content"), "turn", shape, "text")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in ROLES:
        raise Refused("role", f"turn {number} is from {shown(role)}; use human, gpt or system")
    if ROLES[role] != role:
        shape[ROLES[role]] = role
    if text is None:
        raise Refused("turn", f"turn {number} has no text: {text_key!r} is {'null' if text_key in turn else 'missing'}")
    if isinstance(text, bool | int | float):
        text, shape["values"] = json.dumps(text), "numbers"
    elif isinstance(text, list):
        text, shape["values"] = "".join(_part(number, part, paths) for part in text), "parts"
    elif not isinstance(text, str):
        raise Refused("turn", f"turn {number} is {shown(text)}, not a text")
    if ROLES[role] == "human":
        for kind in OTHER_MEDIA:
            if f"<{kind}>" in text:
                raise Refused(kind, f"<{kind}> in turn {number}; only images and text can be trained on")
    # A table of rows in two shapes has all four keys in each, two of them null
    others = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
    return {"from": ROLES[role], "value": text} | others


def _part(number: int, part: Any, paths: list[Any]) -> str:
    """Returns the text of a part; an image's path, where it has one, is added to `paths`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in OTHER_MEDIA:
        raise Refused(kind, f"turn {number} holds a part of type {kind!r}; only images and text can be trained on")
    if kind == "image_url" and isinstance(part.get("image_url"), dict):
        part = {"url": part["image_url"].get("url")}
    elif kind not in ("image", "image_url"):
        raise Refused("turn", f"turn {number} holds {shown(part)}, not a part of type 'text' or 'image'")
    if path := next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None):
        paths.append(path)
    return f"{IMAGE_TOKEN}\n"


def shown(value: Any) -> str:
    """Returns a value in a few characters of ASCII."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
