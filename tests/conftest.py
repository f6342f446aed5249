"""Fixtures every test may use. Real input is read from `SAISA_REALDATA` and is never part of the repository."""

import gc
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for one another
importlib.import_module("tests.no_gpu")

from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGINS = ["tests.shard_sets", "tests.world", "tests.s3_server", "tests.local_ray"]
if "SAISA_TEST_GPU" in os.environ:  # machines with a GPU have few packages, and its tests need none of these fixtures
    PLUGINS = []
REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Imports the fixtures, and with them all that is tested, but not where others run the tests (`-n 3`)."""
    if config.getoption("dist", "no") == "no":
        for name in PLUGINS:
            config.pluginmanager.import_plugin(name)


FIRST = (("local_ray", "world"), ("deep_world",), ("traces",))
"""Fixtures of the tests that each of three processes begins with: what takes long, and needs other fixtures."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets three processes that share the tests (`-n 3`) begin as `FIRST` says.

    Each is given a third of the list; whoever is through takes from the end of the others'.
    """
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT") != str(len(FIRST)):
        return
    parts: list[list[pytest.Item]] = [[] for _ in FIRST]
    short: list[pytest.Item] = []
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        order = sorted(range(len(FIRST)), key=lambda number: FIRST[number] != ("deep_world",))  # it needs `world` too
        found = next((number for number in order if fixtures & set(FIRST[number])), None)
        (short if found is None else parts[found]).append(item)
    share = -(-len(items) // len(FIRST))
    for part in parts:
        num_short = max(0, share - len(part))
        part += short[:num_short]
        del short[:num_short]
    items[:] = [item for part in parts for item in part] + short


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays; without `freeze`, every checkpoint looks through all of it for garbage."""
    if session.items:
        gc.freeze()
        if "SAISA_TEST_GPU" not in os.environ:  # a fork of a process that has asked for GPUs could not use them
            importlib.import_module("tests.processes").start_server(session.config.getoption("capture") == "no")


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
    from pipeline.distributed import initialize_distributed, shutdown_distributed

    initialize_distributed()
    yield
    shutdown_distributed()
