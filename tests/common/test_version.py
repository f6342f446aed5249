"""What shards and checkpoints say wrote them, on machines with and without git."""

import os
import subprocess
import sys
import tomllib

import PIL
import pytest

from common import version
from common.version import REPOSITORY, code_version


def declared() -> str:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def test_without_git_it_is_the_version_of_the_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == {"saisa": declared(), "pillow": PIL.__version__}


def test_without_a_repository_it_is_the_version_of_the_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", os.devnull)
    assert code_version()["saisa"] == declared()
    monkeypatch.setattr(version, "REPOSITORY", tmp_path)  # packages that travelled alone
    assert code_version()["saisa"] == "unknown"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="needs a checkout by git")
def test_in_a_repository_it_is_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_DIR", raising=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(code_version()["saisa"].removesuffix("-dirty")[-7:].removeprefix("g"))


def test_shards_are_written_without_git(tmp_path) -> None:
    """By a process whose PATH holds nothing, as in a slim image."""
    script = (
        "from tests.shard_sets import write_shards; from pathlib import Path; import json, sys;"
        "folder = write_shards(Path(sys.argv[1]) / 'shards', Path(sys.argv[1]) / 'work');"
        "print(json.loads((folder / 'manifest.json').read_text())['code']['saisa'])"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    said = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [declared()]
