"""Each rule for a row has a row that breaks it and a kind to be counted under."""

import hashlib
import json

import pytest

from data_prep.records import Refused, build_record, check_row, refuse

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
ASK = {"from": "human", "value": "Why?"}
SYSTEM = {"from": "system", "value": "Be brief."}


@pytest.mark.parametrize(
    ("row", "paths"),
    [
        ({"image": "a/b.jpg", "conversations": [HUMAN, GPT]}, ("a/b.jpg",)),
        ({"image": ["a.jpg"], "conversations": [HUMAN, GPT, ASK, GPT]}, ("a.jpg",)),
        ({"image": ["a.jpg", "b.jpg"], "conversations": [HUMAN, GPT, HUMAN, GPT]}, ("a.jpg", "b.jpg")),
        ({"conversations": [ASK, GPT]}, ()),
        ({"image": None, "conversations": [ASK, GPT]}, ()),
        ({"image": [], "conversations": [SYSTEM, ASK, GPT]}, ()),
        ({"conversations": [GPT, ASK, GPT]}, ()),  # LLaVA skips an opening gpt turn
        ({"image": "a..b/c.jpg", "conversations": [HUMAN, GPT]}, ("a..b/c.jpg",)),
    ],
)
def test_fit_rows_give_their_image_paths(row: dict, paths: tuple) -> None:
    assert check_row(row) == (row, paths, {})


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("not_an_object", ["id"]),
        ("not_an_object", None),
        ("reserved_key", {"source_shape": {}, "conversations": [ASK, GPT]}),
        ("image_keys", {"images": ["a.jpg"], "image": "a.jpg", "conversations": [HUMAN, GPT]}),
        ("conversations", {"messages": [ASK, GPT], "conversations": [ASK, GPT]}),
        ("turn", {"messages": [{"role": "user", "from": "human", "content": "hi"}, GPT]}),
        ("turn", {"conversations": [{"from": "human"}, GPT]}),
        ("turn", {"conversations": [{"from": "human", "value": {"text": "hi"}}, GPT]}),
        ("turn", {"conversations": [{"from": "human", "value": [{"type": "table"}]}, GPT]}),
        ("empty_turn", {"conversations": [{"from": "human", "value": " \n"}, GPT]}),
        ("empty_turn", {"conversations": [ASK, {"from": "gpt", "value": ""}]}),
        ("video", {"video": "a.mp4", "conversations": [ASK, GPT]}),
        ("video", {"conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, GPT]}),
        ("video", {"messages": [{"role": "user", "content": [{"type": "video"}]}, GPT]}),
        ("audio", {"audios": ["a.wav"], "conversations": [ASK, GPT]}),
        ("audio", {"conversations": [{"from": "human", "value": "<audio>"}, GPT]}),
        ("conversations", {"id": "x"}),
        ("conversations", {"conversations": []}),
        ("conversations", {"conversations": {"from": "human"}}),
        ("turn", {"conversations": ["hello"]}),
        ("turn", {"conversations": [{"from": "human", "value": None}, GPT]}),
        ("role", {"conversations": [{"from": "tool", "value": "hi"}, GPT]}),
        ("role", {"conversations": [{"from": ["human"], "value": "hi"}, GPT]}),
        ("turn_order", {"conversations": [ASK]}),
        ("turn_order", {"conversations": [GPT]}),
        ("turn_order", {"conversations": [ASK, GPT, ASK]}),
        ("turn_order", {"conversations": [ASK, ASK, GPT, GPT]}),
        ("turn_order", {"conversations": [ASK, SYSTEM]}),
        ("image_token", {"image": "a.jpg", "conversations": [ASK, {"from": "gpt", "value": "<image>"}]}),
        ("image_count", {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image><image>"}, GPT]}),
        ("image_count", {"image": "a.jpg", "conversations": [ASK, GPT]}),
        ("image_count", {"conversations": [HUMAN, GPT]}),
        ("image_count", {"image": ["a.jpg", "b.jpg"], "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "", "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": float("nan"), "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": [["a.jpg"]], "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "a\0.jpg", "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "\ud800.jpg", "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "/etc/passwd", "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "C:\\a.jpg", "conversations": [HUMAN, GPT]}),
        ("image_path", {"image": "a/../../b.jpg", "conversations": [HUMAN, GPT]}),
    ],
)
def test_every_rule_refuses_under_its_kind(kind: str, row: object) -> None:
    with pytest.raises(Refused) as raised:
        check_row(row)
    assert raised.value.kind == kind


def test_a_reason_says_what_was_found() -> None:
    with pytest.raises(Refused, match=r"^2 <image> tokens but 1 image path$"):
        check_row({"image": "a.jpg", "conversations": [HUMAN, GPT, HUMAN, GPT]})
    with pytest.raises(Refused, match=r"found human, human, gpt, gpt, human, gpt, \.\.\.$"):
        check_row({"conversations": [ASK, ASK, GPT, GPT, ASK, GPT, ASK, GPT]})


def test_a_reject_can_always_be_written() -> None:
    reject = refuse(7, {"id": "\ud83d"}, Refused("image_path", "bad", "\udcff.jpg"))
    assert json.loads(json.dumps(reject).encode()) == [7, "\\ud83d", "\\udcff.jpg", "image_path", "bad"]
    assert refuse(7, "no row", Refused("k", "r")).id == "7"


def test_a_record_keeps_the_row_and_proves_it() -> None:
    row = {"model": "", "id": 5, "image": "caf\u00e9.jpg", "conversations": [HUMAN, GPT], "z": {"b": 1, "a": [None]}}
    info = {"member": "jpg", "path": "caf\u00e9.jpg", "format": "JPEG", "width": 1, "height": 2}
    record = json.loads(build_record(row, 9, [info]))
    assert list(record) == ["id", "source_index", "sha256", "conversations", "images", "image", "model", "z"]
    assert record["id"] == "5" and record["source_index"] == 9 and record["images"] == [info]
    assert {key: record[key] for key in ("image", "model", "z", "conversations")} == {
        k: row[k] for k in row if k != "id"
    }
    spelled = '{"conversations":[{"from":"human","value":"<image>\\nWhat?"},{"from":"gpt","value":"That."}],'
    spelled += '"id":5,"image":"caf\u00e9.jpg","model":"","z":{"a":[null],"b":1}}'
    assert record["sha256"] == hashlib.sha256(spelled.encode()).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "half \ud83d of a pair"])
def test_what_json_or_utf8_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(Refused) as raised:
        build_record({"conversations": [ASK, GPT], "extra": value}, 0, [])
    assert raised.value.kind == "text"


@pytest.mark.parametrize(
    ("row", "conversations", "image", "source_shape"),
    [
        (
            {
                "messages": [{"role": "user", "content": "<image>a?"}, {"role": "assistant", "content": "b"}],
                "images": ["i"],
            },
            [("human", "<image>a?"), ("gpt", "b")],
            ["i"],
            {
                "turns": "messages",
                "images": "images",
                "role": "role",
                "text": "content",
                "human": "user",
                "gpt": "assistant",
            },
        ),
        (
            {"conversations": [{"from": "user", "value": "a?"}, {"from": "assistant", "value": 3}]},
            [("human", "a?"), ("gpt", "3")],
            None,
            {"human": "user", "gpt": "assistant", "values": "numbers"},
        ),
        (
            {"conversations": [{"role": "human", "value": "<image>"}, {"from": "gpt", "value": 2.50}], "image": "i"},
            [("human", "<image>"), ("gpt", "2.5")],
            "i",
            {"role": "role", "values": "numbers"},
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "i"},
                            {"type": "image", "path": "j"},
                            {"type": "text", "text": "a?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}], "weight": 1},
                ]
            },
            [("system", ""), ("human", "<image>\n<image>\na?"), ("gpt", "b")],
            ["i", "j"],
            {
                "turns": "messages",
                "role": "role",
                "text": "content",
                "human": "user",
                "values": "parts",
                "gpt": "assistant",
                "images": "parts",
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": True}], "images": None},
            [("human", "a?"), ("gpt", "true")],
            None,
            {"images": "images", "values": "numbers"},
        ),
        (  # as a table of rows in two shapes gives them: every turn has all four keys
            {
                "conversations": [
                    {"from": None, "value": None, "role": "user", "content": "a?"},
                    {"from": "", "value": "", "role": "assistant", "content": "b"},
                ]
            },
            [("human", "a?"), ("gpt", "b")],
            None,
            {"role": "role", "text": "content", "human": "user", "gpt": "assistant"},
        ),
    ],
)
def test_the_shapes_of_other_trainers_become_one(
    row: dict, conversations: list, image: object, source_shape: dict
) -> None:
    checked = check_row(row)
    assert [(turn["from"], turn["value"]) for turn in checked.row["conversations"]] == conversations
    assert (checked.row.get("image"), checked.source_shape) == (image, source_shape)
    assert not {"messages", "images"} & checked.row.keys()
    record = json.loads(build_record(row, 3, []))
    assert record["source_shape"] == source_shape and record["conversations"] == checked.row["conversations"]
    assert (
        record["sha256"] == hashlib.sha256(json.dumps(row, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
    )
    assert record["conversations"][-1].get("weight") == next(iter(row.values()))[-1].get("weight")
