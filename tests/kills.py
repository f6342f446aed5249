"""Sharding commands as processes of their own, to be killed: what the fault tests and the soak share."""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300
POLL_SECONDS = 0.005
NO_COMMIT = {"GIT_DIR": os.devnull}
"""Environment for runs that are compared: manifests name the commit, and somebody may commit between two of them."""
HEARS_CTRL_C = ("env", "--default-signal=INT")
"""What is started in the background of a shell would ignore it, and so would its children."""


def make_data(folder: Path, num_rows: int) -> list[str]:
    """Makes rows over a few images that take milliseconds to decode and little room; returns the options for them."""
    (folder / "images").mkdir(parents=True)
    for i in range(10):
        image = Image.linear_gradient("L").resize((900 + i, 700)).convert("RGB")
        image.save(folder / "images" / f"{i}.jpg", quality=50)
    rows = []
    for i in range(num_rows):
        turns = [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": "a" * (i % 97)}]
        rows.append({"id": f"row-{i}", "image": f"{i % 10}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return ["--data", str(folder / "rows.json"), "--images", str(folder / "images"), "--shard-bytes", "60kB"]


def command(options: list[str], out: object) -> list[str]:
    """Returns the command line that makes shards in `out`."""
    return [sys.executable, "-m", "data_prep.shards", *options, "--out", str(out)]


@contextmanager
def running(options: list[str], out: Path) -> Iterator[subprocess.Popen]:
    """Yields the command, running in a session of its own, of which no process outlives the block."""
    with subprocess.Popen(
        [*HEARS_CTRL_C, *command(options, out)],
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.DEVNULL,  # where Ray tells of dead workers
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for member in session_of(process):
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def session_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns all processes of the command's session: the driver, Ray's own and the workers, orphans too."""
    members = []
    for member in psutil.process_iter():
        with suppress(ProcessLookupError):
            members += [member] if os.getsid(member.pid) == process.pid else []
    return members


def kill_worker(process: subprocess.Popen, chance: random.Random) -> bool:
    """Kills one of the Ray workers of the command; returns whether one was writing a shard."""
    writers = []
    for member in session_of(process):
        with suppress(psutil.NoSuchProcess, IndexError):
            writers += [member] if member.cmdline()[0].startswith("ray::write_shard") else []
    try:
        chance.choice(writers).kill()
    except (psutil.NoSuchProcess, IndexError):
        return False
    return True


def wait_for_shards(process: subprocess.Popen, out: Path, number: int) -> None:
    """Returns once there are so many shards.

    Raises:
        AssertionError: The command ended before.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(list(out.glob("*.tar"))) < number:
        assert process.poll() is None, f"it ended with {process.returncode} before there were {number} shards"
        assert time.monotonic() < deadline, f"no {number} shards within {TIMEOUT_SECONDS} s"
        time.sleep(POLL_SECONDS)


def sample_keys(folder: Path) -> list[str]:
    """Returns the key of every record in the tars of a folder, as a reader meets them."""
    keys = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]
    return keys


def contents(folder: Path) -> dict[str, bytes]:
    """Returns everything in a folder by name, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
