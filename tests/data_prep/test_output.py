"""What the files beside the shards say, and when a folder counts as finished, unfinished or somebody else's."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from streaming.base.format.base.reader import FileInfo, SplitReader

from data_prep import output
from data_prep.plan import Scan, Settings
from data_prep.records import Reject
from data_prep.sidecars import ShardSummary

LATE = ShardSummary("shard-000001", 3, 2, 9000, "c" * 64, 300, "d" * 64, (Reject(4, "x", None, "role", "why"),), True)
EARLY = ShardSummary("shard-000000", 5, 6, 8000, "a" * 64, 200, "b" * 64, (), False)
EMPTY = ShardSummary("shard-000002", 0, 0, 1024, "e" * 64, 100, "f" * 64, (Reject(5, "y", None, "role", "why"),), True)
PLAN = {"identity": {"seed": 0}, "modified_sha256": "dates"}
ORIGIN = {
    "settings": asdict(Settings()),
    "sources": {"data": {"name": "rows.json"}},
    "code": {"saisa": "1", "pillow": "2"},
}


def plan_of(identity: dict, modified_sha256: str) -> dict:
    return {"identity": identity, "modified_sha256": modified_sha256}


def test_manifest_counts_add_up() -> None:
    manifest = output.build_manifest([EARLY, LATE], num_rows=9, num_rejected=1)
    assert manifest["fingerprint"] == hashlib.sha256(b"\n".join([b"a" * 64, b"c" * 64])).hexdigest()
    counts = {key: value for key, value in manifest.items() if key.startswith("num_")}
    expected = {"num_rows": 9, "num_samples": 8, "num_rejected": 1, "num_images": 8, "num_shards": 2}
    assert counts == expected | {"num_bytes": 17000}
    with pytest.raises(AssertionError, match=r"10 became 8 \+ 1"):
        output.build_manifest([EARLY, LATE], num_rows=10, num_rejected=1)


def test_streaming_takes_the_index() -> None:
    class TarReader(SplitReader):
        def decode_sample(self, data: bytes) -> dict[str, Any]:
            return {"data": data}

        def get_sample_data(self, idx: int) -> bytes:
            return b""

    index = json.loads(json.dumps(output.build_index([EARLY, LATE, EMPTY], 1000)))
    assert index["version"] == 2 and len(index["shards"]) == 2
    for shard, summary in zip(index["shards"], (EARLY, LATE), strict=True):
        assert (shard.pop("version"), shard.pop("format")) == (2, "saisa-tar")
        for part in ("raw_data", "raw_meta"):
            shard[part] = FileInfo(**shard[part])
        reader = TarReader(dirname="", split=None, **shard)
        assert (len(reader), reader.get_raw_size()) == (summary.num_samples, summary.tar_bytes + summary.sidecar_bytes)
        assert reader.get_zip_size() is None and reader.raw_data.hashes == {"sha256": summary.tar_sha256}
        assert reader.raw_meta.basename == f"{summary.name}.json"


def test_finalize_puts_rejects_in_the_order_of_the_source(tmp_path: Path) -> None:
    scan = Scan(num_rows=11, rejects=[Reject(9, "z", "\u00e9.jpg", "image_missing", "gone")])
    (tmp_path / "shard-000003.tar.1.part").touch()
    output.finalize(tmp_path, PLAN, [EMPTY, LATE, EARLY], scan, ORIGIN)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["index"] for reject in rejects] == [4, 5, 9]
    assert rejects[2] == {
        "source": "rows.json", "index": 9, "id": "z", "file": "\u00e9.jpg", "kind": "image_missing", "reason": "gone"
    }  # fmt: skip
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["tar"] for shard in manifest["shards"]] == [f"shard-00000{i}.tar" for i in range(3)]
    assert manifest["settings"] == asdict(Settings())
    lines = (tmp_path / "rejects.jsonl").read_bytes()
    assert manifest["rejects"] == {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()}
    assert manifest["code"] == {"saisa": "1", "pillow": "2"}
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_is_begun_continued_rechecked_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    assert output.prepare(folder, plan_of({"seed": 0}, "dates")) is False
    assert output.prepare(folder, plan_of({"seed": 1}, "dates")) is False  # no shard yet: the plan may change
    (folder / "shard-000000.tar").touch()
    assert output.prepare(folder, plan_of({"seed": 1}, "dates")) is False
    (folder / "manifest.json").touch()
    with pytest.raises(ValueError, match="holds other shards: seed was 1, is 2; use another --out or delete this one"):
        output.prepare(folder, plan_of({"seed": 2}, "dates"))
    assert output.prepare(folder, plan_of({"seed": 1}, "other dates")) is True
    assert (folder / "manifest.json").exists()
    assert output.prepare(folder, plan_of({"seed": 1}, "dates")) is False
    assert not (folder / "manifest.json").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not empty \(it holds thesis\.tex\)"):
        output.prepare(tmp_path, plan_of({"seed": 0}, "dates"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "missing", ["plan.json", "index.json", "manifest.json", "rejects.jsonl", "shard-000000.tar", "shard-000000.json"]
)
def test_finished_means_that_every_file_is_there_and_none_has_grown(tmp_path: Path, missing: str) -> None:
    output.prepare(tmp_path, plan_of({"seed": 0}, "dates"))
    for name, size in (("tar", EARLY.tar_bytes), ("json", EARLY.sidecar_bytes)):
        (tmp_path / f"{EARLY.name}.{name}").write_bytes(bytes(size))
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) is None
    manifest = output.finalize(tmp_path, PLAN, [EARLY], Scan(num_rows=5), ORIGIN)
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) == manifest
    assert output.finished(tmp_path, plan_of({"seed": 1}, "dates")) is None
    assert output.finished(tmp_path, plan_of({"seed": 0}, "others")) is None
    data = (tmp_path / missing).read_bytes()
    (tmp_path / missing).write_bytes(data + b"\n\n{")
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) is None
    (tmp_path / missing).write_bytes(data)
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) == manifest
    (tmp_path / missing).unlink()
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) is None


@pytest.mark.parametrize("missing", ["shard-000002.tar", "shard-000002.json"])
def test_finished_means_that_shards_are_there_of_which_every_row_was_refused(tmp_path: Path, missing: str) -> None:
    """The index does not list them."""
    output.prepare(tmp_path, plan_of({"seed": 0}, "dates"))
    for shard in (EARLY, EMPTY):
        (tmp_path / f"{shard.name}.tar").write_bytes(bytes(shard.tar_bytes))
        (tmp_path / f"{shard.name}.json").write_bytes(bytes(shard.sidecar_bytes))
    manifest = output.finalize(tmp_path, PLAN, [EARLY, EMPTY], Scan(num_rows=6), ORIGIN)
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) == manifest
    (tmp_path / missing).unlink()
    assert output.finished(tmp_path, plan_of({"seed": 0}, "dates")) is None
