"""A checkpoint's files are what was written: every byte of each counts, and each process reads its share."""

import json
import os

import pytest
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from pipeline.checkpoint import integrity
from pipeline.checkpoint.integrity import damaged_files, own_digests, write_manifest
from pipeline.distributed import initialize_distributed, shutdown_distributed
from tests.processes import run_together


@pytest.fixture
def folder(tmp_path):
    """What three processes write, each of which hashed its own files; the second had nothing to write."""
    for name in ("__0_0.distcp", "__0_1.distcp", "__2_0.distcp", ".metadata", "metadata.json", "info.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, own_digests(tmp_path, 0) | own_digests(tmp_path, 1) | own_digests(tmp_path, 2))
    return tmp_path


def damage_seen(folder) -> list[str]:
    initialize_distributed()
    found = damaged_files(folder)
    shutdown_distributed()
    return found


def test_the_manifest_is_megatron_cores(folder):
    verify_integrity_manifest(str(folder))
    assert len(json.loads((folder / "integrity.json").read_text())["files"]) == 6


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_every_process_learns_what_any_of_them_found(folder, num_processes):
    assert run_together(num_processes, damage_seen, folder) == [[]] * num_processes
    for name in ("__0_1.distcp", "info.json"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    (folder / ".metadata").unlink()
    for found in run_together(num_processes, damage_seen, folder):
        assert sorted(found) == [".metadata", "__0_1.distcp", "info.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"files"', b"[]", b"null", b'{"files": {}}', b'{"files": []}'])
def test_a_manifest_that_cannot_be_read_is_damage(folder, content):
    (folder / "integrity.json").unlink()
    if content is not None:
        (folder / "integrity.json").write_bytes(content)
    assert damage_seen(folder) == ["integrity.json"]


def test_a_writer_that_ended_before_it_had_hashed_is_noticed(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"0")
    (tmp_path / "__1_0.distcp").write_bytes(b"1")
    with pytest.raises(OSError, match="__1_0.distcp: the process that wrote it ended before it was done"):
        write_manifest(tmp_path, own_digests(tmp_path, 0))
    assert not (tmp_path / "integrity.json").exists()


def without_manifest_on_the_last(folder) -> list[str]:
    """Returns what is seen where the last process cannot read the manifest, as a file server may have it."""
    if os.environ["RANK"] == "2":
        integrity.MANIFEST = "elsewhere.json"
    return damage_seen(folder)


def test_a_process_that_cannot_read_the_manifest_does_not_pass_its_share(folder):
    assert run_together(3, without_manifest_on_the_last, folder) == [["elsewhere.json"]] * 3


def test_a_file_that_the_manifest_does_not_know_is_damage(folder):
    (folder / "__7_0.distcp").write_bytes(b"7")
    assert damage_seen(folder) == ["__7_0.distcp"]
