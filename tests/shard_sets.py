"""Shard sets written without Ray. The small one here: eight shards, with a long record and a text without image."""

import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from common.version import code_version
from data_prep import output
from data_prep.plan import Settings, build_plan, identity
from data_prep.shard_task import write_shard
from data_prep.shards import build_tasks
from data_prep.source import open_source

NUM_SAMPLES = 30
LONG_ANSWER = "word " * 4000


def write_shards(folder: Path, work: Path, seed: int = 0) -> Path:
    """Returns `folder` after writing shards to it; `work` takes what they are made from."""
    work.mkdir()
    settings, rows = Settings(shard_bytes=60_000, seed=seed), []
    for i in range(NUM_SAMPLES):
        answer = LONG_ANSWER if i == 7 else f"answer {i}"
        turns = [{"from": "human", "value": "<image>\nWhat?" if i else "Why?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": i, "conversations": turns} | ({"image": f"{i}.png"} if i else {}))
        Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(work / f"{i}.png")
    (work / "rows.json").write_text(json.dumps(rows))
    return shard_here(work / "rows.json", work, folder, settings)


def shard_here(data: Path, images: Path, folder: Path, settings: Settings) -> Path:
    """Returns `folder` after doing what `make_shards` does, in this process."""
    folder.mkdir()
    with open_source(data, images, settings, Console(file=io.StringIO())) as source:
        plan = build_plan(source.scan, settings)
        summaries = [write_shard(task) for task in build_tasks(source, folder, settings, plan, recheck=False)]
        same = identity(source.scan, settings, source.description["data"]["sha256"])
        plan_file = {"identity": same, "modified_sha256": source.scan.modified_sha256}
        output.write_plan(folder, plan_file)
        origin = {"settings": asdict(settings), "sources": source.description, "code": code_version()}
        output.finalize(folder, plan_file, summaries, source.scan, origin)
    return folder


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set; tests that damage it copy it first."""
    root = tmp_path_factory.mktemp("shard-set")
    return write_shards(root / "shards", root / "work")
