"""`make tiny-base`: all the rows that sharding takes, lines that work when copied, one line on a full disk."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.console import describe
from orchestration.tiny_base import main, read_texts
from pipeline.config import load_config
from tests.full_disk import no_file_larger_than

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TEXTS = [f"{text} {number}" for number in range(60) for text in ("<image>\nHow many dots?", "as many as")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Parquet files of sixty rows with their images inside, and of one row that has no answer."""
    rows = [
        {
            "image": {"bytes": b"pixels", "path": None},
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for question, answer in zip(TEXTS[::2], TEXTS[1::2], strict=True)
    ]
    rows.insert(40, {**rows[0], "conversations": rows[0]["conversations"][:1]})
    (tmp_path / "rows").mkdir()
    for name, part in (("0.parquet", rows[:31]), ("1.parquet", rows[31:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "rows" / name)
    return tmp_path / "rows"


def test_it_reads_what_sharding_reads_and_prints_lines_that_work(table, tmp_path, capsys):
    assert list(read_texts(table)) == TEXTS
    told = capsys.readouterr().err
    assert told.startswith("1 row left out, which `make shards` would refuse; index 40: human and gpt must take turns")
    out = tmp_path / "base"
    main(str(table), out)
    lines = re.findall(r'make train CONFIG=(\S+) ARGS="(.*)"', capsys.readouterr().out)
    stage1, stage2 = (load_config(CONFIGS.parent / config, shlex.split(settings)) for config, settings in lines)
    built = json.loads((out / "config.json").read_text())
    for config in (stage1, stage2):
        assert (config.init.base, config.model.vocab_size) == (out, built["vocab_size"])
        assert config.data.shards[0].location == f"{out}-shards"
    assert stage2.init.projector == str(stage1.run_dir) != str(stage2.run_dir)


def test_rows_that_cannot_be_used_are_told_in_one_line(tmp_path):
    for text, message in (("[7, 8]", "refuse every row .index 0: the row is 7, not an object"), ("{", "JSON object")):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            main(str(tmp_path / "rows.json"), tmp_path / "base")


def test_a_disk_that_is_full_is_named(table, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with no_file_larger_than(20_000), pytest.raises(OSError) as error:
        main(str(table), tmp_path / "base")
    assert re.match(rf"{tmp_path}/\S+: File too large; no file may be that large there", describe(error.value))
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]
