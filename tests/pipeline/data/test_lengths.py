"""The length table: what encoding gives, computed once, found again, and never another's."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from common.console import describe
from pipeline.data import lengths, probes, samples, templates
from pipeline.data.lengths import Encoding, LengthTable, join, length_table, measure
from pipeline.data.samples import build_sample
from pipeline.shards.shard_set import ShardSet
from tests.full_disk import no_file_larger_than

QUIET = Console(quiet=True)


@pytest.fixture
def shards(world) -> ShardSet:
    return ShardSet(world.root / "shards")


@pytest.fixture
def encoding(world) -> Encoding:
    return Encoding(world.root / "base", "v1", 16, 200)


def test_a_table_says_what_encoding_gives(shards, encoding, tmp_path):
    table = length_table(shards, encoding, tmp_path, QUIET)
    tokenizer = AutoTokenizer.from_pretrained(encoding.tokenizer)
    assert len(table) == len(shards) and not table.problems
    for number in range(0, len(shards), 7):
        sample = build_sample(shards.record(number), "v1", tokenizer, 16, 200)
        expected = [len(sample.text_token_ids), len(sample.image_positions), sample.num_targets]
        assert table.values[number].tolist() == [*expected, sample.num_dropped_targets, sample.num_truncated_tokens]
    assert table.column("num_targets").tolist() == table.values[:, 2].tolist()


def test_a_table_is_computed_once(shards, encoding, tmp_path, monkeypatch):
    first = length_table(shards, encoding, tmp_path, QUIET)
    monkeypatch.setattr(lengths, "measure_shard", None)
    again = length_table(shards, encoding, tmp_path, QUIET)
    assert np.array_equal(first.values, again.values) and again.problems == first.problems


def test_a_full_disk_is_one_line_and_leaves_nothing(shards, encoding, tmp_path):
    with no_file_larger_than(100), pytest.raises(OSError) as full:
        length_table(shards, encoding, tmp_path, QUIET)
    assert re.match(rf"{tmp_path}/lengths-\w+\.npz: File too large; no file may be that large", describe(full.value))
    assert not list(tmp_path.iterdir())


def test_processes_give_the_same_table(shard_folder, encoding, tmp_path, monkeypatch):
    shards = ShardSet(shard_folder)
    one = length_table(shards, encoding, tmp_path / "one", QUIET)
    monkeypatch.setattr(lengths, "SAMPLES_PER_PROCESS", 10)
    monkeypatch.setattr(lengths.os, "sched_getaffinity", lambda _: {0, 1})
    two = length_table(shards, encoding, tmp_path / "two", QUIET)
    assert len(shards.shard_sizes) > 2 and np.array_equal(one.values, two.values)


def test_whatever_changes_a_length_changes_the_name(encoding, world, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(world.root / "base", other)
    same = Encoding(other, "v1", 16, 200)
    assert same.fingerprint() == encoding.fingerprint()
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    changed = [same, Encoding(world.root / "base", "plain", 16, 200)]
    changed += [Encoding(world.root / "base", "v1", 17, 200), Encoding(world.root / "base", "v1", 16, 201)]
    assert len({encoding.fingerprint(), *(item.fingerprint() for item in changed)}) == 5


def test_a_record_that_cannot_be_encoded_has_no_text_and_a_reason(shards, encoding):
    records = [shards.record(0), {"id": "bad", "conversations": []}, shards.record(1)]
    table = measure(records, encoding, AutoTokenizer.from_pretrained(encoding.tokenizer))
    assert [text > 0 for text in table.column("num_text")] == [True, False, True]
    assert list(table.problems) == [1] and "record bad" in table.problems[1]


def test_tables_of_several_sets_are_numbered_through():
    tables = [LengthTable(np.full((2, 5), 1), {1: "a"}), LengthTable(np.full((3, 5), 2), {0: "b"})]
    table = join(tables)
    assert table.values[:, 0].tolist() == [1, 1, 2, 2, 2] and table.problems == {1: "a", 2: "b"}


def test_other_code_has_another_name(encoding, monkeypatch):
    """Each of these is a one-line change of encoding that leaves some lengths and all settings as they were."""
    vicuna, real_cut = templates.TEMPLATES["v1"], samples._cut
    names = [encoding.fingerprint()]

    def name_with(where, **changes) -> None:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(where, name, value)
            names.append(encoding.fingerprint())

    name_with(templates, TEMPLATES=templates.TEMPLATES | {"v1": replace(vicuna, strip=True)})
    name_with(templates, TEMPLATES=templates.TEMPLATES | {"v1": replace(vicuna, user=("USER: ", "\n"))})
    name_with(templates, TEMPLATES=templates.TEMPLATES | {"v1": replace(vicuna, system=("", "  "))})
    name_with(templates, _place_image=lambda text, has_image: text)
    name_with(samples, _cut=lambda ids, labels, v, limit: real_cut(ids, labels, v, limit - 1))
    name_with(probes, PROBES=[record | {"turns": record["conversations"]} for record in probes.PROBES])
    name_with(lengths, COLUMNS=(*lengths.COLUMNS, "num_sounds"))
    names.append(encoding.fingerprint())
    assert names[0] == names[-1] and len(set(names)) == len(names) - 1


def test_a_flipped_byte_of_a_table_is_named(shards, encoding, tmp_path):
    length_table(shards, encoding, tmp_path, QUIET)
    (file,) = tmp_path.glob("lengths-*.npz")
    whole = file.read_bytes()
    for place in [*range(0, len(whole), len(whole) // 12), *range(-40, 0, 4)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place % len(whole) + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*delete it, and it is computed again"):
            length_table(shards, encoding, tmp_path, QUIET)


def test_a_table_is_an_archive_that_numpy_reads(shards, encoding, tmp_path):
    table = length_table(shards, encoding, tmp_path, QUIET)
    (file,) = tmp_path.glob("lengths-*.npz")
    with np.load(file) as stored:
        assert np.array_equal(stored["values"], table.values)


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"not an archive at all"])
def test_a_damaged_table_says_so(shards, encoding, tmp_path, damage):
    length_table(shards, encoding, tmp_path, QUIET)
    (file,) = tmp_path.glob("lengths-*.npz")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is damaged .*delete it, and it is computed again"):
        length_table(shards, encoding, tmp_path, QUIET)
