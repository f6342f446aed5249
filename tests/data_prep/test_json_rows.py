"""Rows are read through a small window exactly as `json.loads` reads them, and broken files say where they broke."""

import json
from pathlib import Path

import pytest

from data_prep import json_rows
from data_prep.json_rows import read_rows

ROWS = [
    {"id": i, "text": 'caf\u00e9 "\u4f60\u597d" \U0001f600\n' * (i % 4), "deep": [{"x": [i, 0.5]}]} for i in range(40)
]
SPELLINGS = {
    "indented.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "compact.json": json.dumps(ROWS, separators=(",", ":")),
    "marked.json": "\ufeff \n" + json.dumps(ROWS),
    "lines.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "spaced.jsonl": "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n",
    "array.jsonl": json.dumps(ROWS),
}


@pytest.mark.parametrize("chunk_bytes", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("name", SPELLINGS)
def test_rows_and_their_places_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / name
    path.write_bytes(SPELLINGS[name].encode())
    rows, data = list(read_rows(path)), path.read_bytes()
    assert [row.value for row in rows] == ROWS
    assert [row.index for row in rows] == list(range(40))
    assert [json.loads(data[row.offset : row.offset + row.num_bytes]) for row in rows] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b" \n", "is empty"),
        ("a.json", b"[ ]", "is an empty list"),
        ("a.json", b'{"data": []}', "holds a JSON object; it must be a JSON array"),
        ("a.json", b"hello", "starts with 'h'"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "starts with 'v'"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "Expecting ':' delimiter at line 2 (byte 17)"),
        ("a.json", b'[{"a": 1}', "the file ends inside the array at line 1 (byte 9)"),
        ("a.json", b'[{"a": 1}, {"a', "Unterminated string starting at at line 1 (byte 12)"),
        ("a.json", b"[{}, ]", "Expecting value at line 1 (byte 5)"),
        ("a.json", b"[{}]\n[{}]", "text follows the end of the array at line 2 (byte 5)"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8 (invalid start byte) at line 1 (byte 8)"),
        ("a.json", b"[" * 50_000, "nested more than 100 deep, and it does not end"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}', "at line 3"),
        ("a.jsonl", b'{"a": 1},\n{"a": 2}', "Expecting value at line 1 (byte 8)"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        list(read_rows(path))
    assert str(path) in str(raised.value)
    assert problem in str(raised.value)


def test_a_broken_row_does_not_pull_the_rest_of_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 10)
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARS", 200)
    path = tmp_path / "a.json"
    path.write_text("[{@" + " " * 100_000 + "}]")
    window = json_rows._Window(path.open("rb"), path)
    window.next_char()
    window.skip(1)
    with pytest.raises(ValueError, match="byte 2"):
        window.read_value()
    assert len(window.text) < 1000
    window.file.close()


@pytest.mark.parametrize("depth", [99, 100, 400, 990, 60_000])
@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_a_row_that_is_nested_too_deeply_has_no_value_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk_bytes)
    deep = '{"id": "]}\\"", "extra": ' + "[" * depth + "]" * depth + "}"
    path = tmp_path / "a.json"
    path.write_text(f'[{{"id": 0}}, {deep}, {{"id": 2}}]')
    rows = list(read_rows(path))
    problem = None if depth < 100 else "nested more than 100 deep"
    assert [row.problem for row in rows] == [None, problem, None]
    assert [row.value == {} or bool(row.value) for row in rows] == [True, depth < 100, True]
    assert path.read_bytes()[rows[1].offset :][: rows[1].num_bytes].decode() == deep
