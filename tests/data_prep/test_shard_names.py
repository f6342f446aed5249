"""Which names in a listing are those of shards, written out by hand."""

import pytest
from pydantic import TypeAdapter, ValidationError

from data_prep.listings import Digest, Entry
from data_prep.plan import shard_name
from data_prep.shard_names import check_shard_names

EVIL = (
    "../shard-000000",
    "../../home/.bashrc",
    "/etc/passwd",
    "a/shard-000000",
    "shard-000000/../x",
    "shard-000000\n",
    "shard-000000\0",
    "Shard-000000",
    "shard-00000",
    "shard-" + "1" * 300,
    "shard-" + "\u0661" * 6,  # digits to `str.isdigit` and `\d`
    "file://shard-000000",
    "manifest",
    ".lock",
    "",
    None,
    7,
    ["shard-000000"],
    {"name": "shard-000000"},
)


def with_end(stem, end):
    return stem + end if isinstance(stem, str) else stem


def test_names_that_this_project_writes_are_names():
    check_shard_names([(f"{shard_name(n)}.tar", f"{shard_name(n)}.json") for n in (0, 7, 999_999, 1_000_000)])


@pytest.mark.parametrize("stem", EVIL, ids=[f"name{i}" for i in range(len(EVIL))])
def test_other_names_are_refused_by_name(stem):
    with pytest.raises(ValueError, match="no name of a shard") as caught:
        check_shard_names([(with_end(stem, ".tar"), with_end(stem, ".json"))])
    told = str(caught.value)
    assert told.isprintable() and told.isascii() and len(told) < 200
    with pytest.raises(ValueError, match="not the name of the sidecar of shard-000001.tar"):
        check_shard_names([("shard-000001.tar", with_end(stem, ".json"))])


def test_a_sidecar_is_that_of_its_tar_and_no_shard_is_listed_twice():
    with pytest.raises(ValueError, match="'shard-000002.json' is not the name of the sidecar of shard-000001.tar"):
        check_shard_names([("shard-000001.tar", "shard-000002.json")])
    with pytest.raises(ValueError, match="shard-000001.tar is listed twice"):
        check_shard_names([("shard-000001.tar", "shard-000001.json")] * 2)


def test_a_fingerprint_is_64_hex_digits():
    check = TypeAdapter(Digest, config=Entry.model_config).validate_python
    assert check("0123456789abcdef" * 4) == "0123456789abcdef" * 4
    for value in ("..", "a" * 63, "A" * 64, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61, None, 0, ["a" * 64]):
        with pytest.raises(ValidationError):
            check(value)
