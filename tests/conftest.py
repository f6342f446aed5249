"""Fixtures every test may use. Real input is read from `SAISA_REALDATA` and is never part of the repository."""

import gc
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for one another
importlib.import_module("tests.no_gpu")

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.distributed import initialize_distributed, shutdown_distributed

pytest_plugins = ["tests.world", "tests.shard_sets", "tests.s3_server", "tests.local_ray"]
REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What is imported stays; without this, every checkpoint looks through all of it for garbage."""
    gc.freeze()


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder with real photos, captions, questions and tokenizers; skips the test where there is none."""
    folder = Path(os.environ.get("SAISA_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: set SAISA_REALDATA (no folder {folder})")
    return folder


@pytest.fixture
def megatron() -> Iterator[None]:
    """A process group of one, with megatron-core's groups on it, so that its layers can be built in this process."""
    initialize_distributed()
    yield
    shutdown_distributed()
