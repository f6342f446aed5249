"""JSON from outside: whatever is wrong with it is a `ValueError` that names the file."""

import json
from typing import Any

from common.files import Location, read_whole

MAX_DEPTH = 100
"""Lists and objects within each other: what reads and sends them on calls itself for each, and Python ends that."""
MAX_FILE_BYTES = 64 << 20
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def parse_json(data: bytes | str) -> Any:
    """Returns what JSON says.

    Raises:
        ValueError: It is none, or nested more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        value = None
    else:
        if not is_too_deep(value):
            return value
    raise ValueError(f"it is {TOO_DEEP}")


def is_too_deep(value: Any) -> bool:
    """Whether parsed JSON is nested more than `MAX_DEPTH` deep."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        inner = (each.values() if type(each) is dict else each for each in level)
        level = [each for values in inner for each in values if type(each) in (dict, list)]
    return bool(level)


def read_json_object(file: Location, way_out: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: The file is not one; the message names it and says what to do.
        OSError: It cannot be read.
    """
    try:
        if isinstance(found := parse_json(read_whole(file, MAX_FILE_BYTES)), dict):
            return found
        raise ValueError(f"a {type(found).__name__} instead of an object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {way_out}") from error
