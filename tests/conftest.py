"""Fixtures every test may use. Real input is read from `SAISA_REALDATA` and is never part of the repository."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for one another
if "SAISA_TEST_GPU" not in os.environ:  # set by `make test-gpu`; all others compare with the CPU, on any machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.distributed import initialize_distributed, shutdown_distributed

pytest_plugins = ["tests.world", "tests.shard_sets", "tests.s3_server"]
REPOSITORY = Path(__file__).resolve().parent.parent


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
