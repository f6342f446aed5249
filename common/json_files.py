"""JSON from outside: whatever is wrong with it is a `ValueError` that names the file."""

import json
from typing import Any

from common.files import Location, read_whole


def parse_json(data: bytes | str) -> Any:
    """Returns what JSON says.

    Raises:
        ValueError: It is none, or nested more deeply than Python reads.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(file: Location, way_out: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: The file is not one; the message names it and says what to do.
        OSError: It cannot be read.
    """
    try:
        if isinstance(found := parse_json(read_whole(file)), dict):
            return found
        raise ValueError(f"a {type(found).__name__} instead of an object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {way_out}") from error
