"""What travels with `make submit`, asked of Ray's own packaging: all code, and no data, weights or history."""

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from common.console import UsageError
from orchestration.submit_check import MAX_BYTES, check_size, files_to_upload, main
from tests.command_line import run_command
from tests.source_files import ROOT, source_files

CODE = ("common", "data_prep", "model", "pipeline", "orchestration", "configs", "benchmarks")
STAYS = (
    "blip_laion_cc_sbu_558k.json",
    "images.zip",
    "rows.jsonl",
    "train/train-00000-of-00002.parquet",
    "saved/data-00000-of-00001.arrow",
    "shards/shard-000000.tar",
    "shards/shard-000000.json",
    "images/coco/1.jpg",
    "images/2.JPEG",
    "images/3.png",
    "vicuna/model-00001-of-00002.safetensors",
    "vicuna/pytorch_model.bin",
    "vicuna/tokenizer.model",
    "my_run/checkpoints/step-00000001/__0_0.distcp",
    "my_run/checkpoints/step-00000001/.metadata",
    "my_run/checkpoints/step-00000001/common.pt",
    "runs/demo/metrics.jsonl",
    "bases/tiny/config.json",
    "data/rows.txt",
    ".git/HEAD",
    ".venv/bin/python",
    ".envs/hf5/x.py",
    "pipeline/__pycache__/loop.cpython-312.pyc",
)
TRAVELS = ("mine/run.yaml", "mine/models/sizes.yml", "pyproject.toml", "Makefile")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The code of this repository, and what the README's commands leave beside it."""
    folder = tmp_path / "clone"
    listed = map(str, source_files([*CODE, "tests"]))
    for name in (*listed, *STAYS, *TRAVELS, ".rayignore", ".gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        (folder / name).write_bytes(source.read_bytes() if source.is_file() and name not in STAYS else b"x")
    return folder


def packed(folder: Path, package: Path) -> set[str]:
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def test_all_code_travels_and_nothing_else(clone: Path, tmp_path: Path) -> None:
    found = packed(clone, tmp_path / "package.zip")
    assert found.isdisjoint(STAYS) and found >= {*TRAVELS}
    code = {str(path.relative_to(clone)) for name in CODE for path in (clone / name).rglob("*") if path.is_file()}
    assert code - {*STAYS} <= found and len(code) > 100
    assert not [name for name in found if name.startswith(("tests/", ".git/"))]
    assert {str(path.relative_to(clone)) for path in files_to_upload(clone)} == found


def test_too_much_is_refused_and_the_largest_files_are_named(clone: Path) -> None:
    check_size(files_to_upload(clone), clone)
    assert sum(files_to_upload(clone).values()) < MAX_BYTES / 5
    for number in range(7):
        with (clone / f"large-{number}").open("wb") as file:
            file.truncate(MAX_BYTES // 7 + number * 1_000_000)
    with pytest.raises(UsageError, match="large-6 .13.1 MB., large-5 .12.1 MB., large-4 .11.1 MB.*; move them out of"):
        check_size(files_to_upload(clone), clone)
    status, said = run_command(main, clone)
    assert status == 2 and "error: make submit would upload" in said and "large-1 " not in said
