"""The special tokens of a tokenizer, as its files spell them."""

import json
from pathlib import Path

import pytest

from common.console import UsageError
from data_prep.json_rows import Row
from data_prep.plan import scan_rows
from data_prep.special_tokens import read_special_tokens

FILES = {
    "tokenizer.json": {
        "added_tokens": [
            {"content": "<|im_end|>", "special": True},
            {"content": "<tab>", "special": False},
            {"content": "<image>", "special": True},
        ]
    },
    "special_tokens_map.json": {
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    },
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "unk_token": None,
        "add_bos_token": True,
        "added_tokens_decoder": {"7": {"content": "<pad>", "special": True}},
    },
}


def test_every_file_is_asked_and_the_mark_of_an_image_is_none(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert set(read_special_tokens(tmp_path)) == {"<|im_end|>", "</s>", "<a>", "<b>", "<s>", "<pad>"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"added_tokens": 3}', "{}"])
def test_a_folder_that_names_none_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="--tokenizer"):
        read_special_tokens(tmp_path)


def test_rows_that_spell_one_are_counted_and_the_first_is_named() -> None:
    texts = ["plain", "ends with </s>", "</s></s> twice", "<s>"]
    rows = [
        {"id": f"r{i}", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]}
        for i, text in enumerate(texts)
    ]
    scan = scan_rows(
        [Row(i, 0, 0, row) for i, row in enumerate(rows)], lambda path: None, special_tokens=("</s>", "<s>")
    )
    assert scan.notes == {
        "row with the special token </s> in its text": (2, "turn 1 (record r1)"),
        "row with the special token <s> in its text": (1, "turn 1 (record r3)"),
    }
