"""Reads the rows of a JSON array or a JSONL file one at a time, with the bytes each occupies in the file.

A data set of gigabytes is scanned through a window of a megabyte, and a row can be fetched again later by its
`offset` and `num_bytes` without parsing the file again.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.json_files import MAX_DEPTH, TOO_DEEP, is_too_deep

CHUNK_BYTES = 1 << 20
MAX_ROW_CHARS = 64 << 20
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
SPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """A parsed row and where it stands in its file: `offset` and `num_bytes` are in bytes.

    A row that is nested too deeply has no `value`, and a `problem` that says so.
    """

    index: int
    offset: int
    num_bytes: int
    value: Any
    problem: str | None = None


def read_rows(path: Path, name: object = None) -> Iterator[Row]:
    """Yields the rows of a JSON array, or of a file that is named .jsonl, in order.

    Args:
        path: The file.
        name: What errors call it, if it is a copy of something that the user knows.

    Raises:
        ValueError: The file is not JSON or not a list of rows; the message names the file and the position.
    """
    with path.open("rb") as file:
        name = name or path
        window = _Window(file, name)
        first = window.next_char()
        if first == "[":
            rows = _array_values(window)
        elif first == "{" and path.suffix in (".jsonl", ".ndjson"):
            rows = iter(lambda: window.read_value() if window.next_char() else None, None)
        else:
            held = {"": "is empty", "{": "holds a JSON object"}.get(first, f"starts with {first!r}")
            raise ValueError(f"{name} {held}; it must be a JSON array of rows (or, named .jsonl, one row a line)")
        index = -1
        for index, (offset, num_bytes, value) in enumerate(rows):
            is_deep = value is TOO_DEEP
            yield Row(index, offset, num_bytes, None if is_deep else value, TOO_DEEP if is_deep else None)
        if index < 0:
            raise ValueError(f"{name} is an empty list; it must hold at least one row")


def _array_values(window: "_Window") -> Iterator[tuple[int, int, Any]]:
    window.skip(1)
    mark = window.next_char()
    while mark != "]":
        yield window.read_value()
        mark = window.next_char()
        if mark not in (",", "]"):
            raise window.error(f"expected ',' or ']', found {mark!r}" if mark else "the file ends inside the array")
        if mark == ",":
            window.skip(1)
    window.skip(1)
    if window.next_char():
        raise window.error("text follows the end of the array")


class _Window:
    """A moving window on a UTF-8 file: `text[at:]` is not yet used and begins at byte `offset` of line `line`."""

    def __init__(self, file: BinaryIO, name: object):
        self.offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self.offset)
        self.file, self.name = file, name
        self.text, self.at, self.line, self.grow = "", 0, 1, CHUNK_BYTES
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def more(self) -> bool:
        """Returns whether the file went on; doubles its step, so that a huge row is not parsed too often."""
        chunk = self.file.read(self.grow)
        self.text, self.at, self.grow = self.text[self.at :], 0, self.grow * 2
        try:
            self.text += self.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode()
            raise self.error(f"not UTF-8 ({error.reason})", len(self.text)) from None
        return bool(chunk)

    def skip(self, num_chars: int) -> int:
        """Returns the number of bytes that the next `num_chars` characters occupy, and passes over them."""
        used = self.text[self.at : self.at + num_chars]
        num_bytes = len(used.encode())
        self.at, self.offset, self.line = self.at + num_chars, self.offset + num_bytes, self.line + used.count("\n")
        return num_bytes

    def next_char(self) -> str:
        """Returns the first character that is not white space, leaving it unused; empty at the end of the file."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.skip(space.end() - self.at if space else 0)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def read_value(self) -> tuple[int, int, Any]:
        """Returns the next value with its offset and length in bytes."""
        self.next_char()
        self.grow = CHUNK_BYTES
        while True:
            try:
                value, end = self._parse()
                if end < len(self.text) or not self.more():  # a number at the window's edge may go on
                    offset = self.offset
                    return offset, self.skip(end - self.at), value
            except ValueError as error:
                num_chars = getattr(error, "pos", self.at) - self.at
                if len(self.text) - self.at > MAX_ROW_CHARS or not self.more():
                    raise self.error(getattr(error, "msg", None) or str(error), num_chars) from None

    def _parse(self) -> tuple[Any, int]:
        """Returns the value that begins here, or `TOO_DEEP`, and where it ends.

        Raises:
            ValueError: It is none, or goes on behind the window.
        """
        try:
            value, end = json.JSONDecoder().raw_decode(self.text, self.at)
        except RecursionError:
            return TOO_DEEP, _end_of_value(self.text, self.at)
        brackets = self.text.count("[", self.at, end) + self.text.count("{", self.at, end)
        return TOO_DEEP if brackets > MAX_DEPTH and is_too_deep(value) else value, end

    def error(self, problem: str, num_chars: int = 0) -> ValueError:
        """Returns the error to raise for a problem that lies `num_chars` after the first unused character."""
        before = self.text[self.at : self.at + num_chars]
        line, byte = self.line + before.count("\n"), self.offset + len(before.encode())
        return ValueError(f"{self.name} is not a list of rows in JSON: {problem} at line {line} (byte {byte})")


def _end_of_value(text: str, start: int) -> int:
    """Returns where a list or object ends, by its brackets.

    Raises:
        ValueError: It does not.
    """
    depth = 0
    for found in TOKEN.finditer(text, start):
        depth += STEPS.get(found[0], 0)
        if not depth:
            return found.end()
    raise ValueError(f"{TOO_DEEP}, and it does not end")
