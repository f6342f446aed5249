"""Sharding commands as processes of their own, to be killed: what the fault tests and the soak share."""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
RAY_IS_LATE = "Ray does not start on this machine"
MOST_STARTS = 5


class RayIsLate(Exception):
    """Ray gives its processes 30 seconds to start and a busy machine took longer: nothing was tried, nothing shown."""


def make_data(folder: Path, num_rows: int) -> list[str]:
    """Makes rows over a few images that take milliseconds to decode and little room; returns the options for them."""
    (folder / "images").mkdir(parents=True)
    for i in range(10):
        image = Image.linear_gradient("L").resize((900 + i, 700)).convert("RGB")
        image.save(folder / "images" / f"{i}.jpg", quality=50)
    rows = []
    for i in range(num_rows):
        turns = [{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": "a" * (1 + i % 97)}]
        rows.append({"id": f"row-{i}", "image": f"{i % 10}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return ["--data", str(folder / "rows.json"), "--images", str(folder / "images"), "--shard-bytes", "60kB"]


def command(options: list[str], out: object) -> list[str]:
    """Returns the command line that makes shards in `out`."""
    return [sys.executable, "-m", "data_prep.shards", *options, "--out", str(out)]


def run_to_end(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Returns how a sharding command line ended, after Ray had started."""

    def start() -> subprocess.CompletedProcess[str]:
        run = subprocess.run([str(each) for each in arguments], cwd=REPOSITORY, capture_output=True, text=True)
        check_ray(run.stderr)
        return run

    return until_ray_starts(start)


@contextmanager
def running(options: list[str], out: Path, num_shards: int) -> Iterator[subprocess.Popen]:
    """Yields the command in a session of its own, once it has written so many shards; it ends with the block."""
    with ExitStack() as sessions:

        def start() -> subprocess.Popen:
            process = sessions.enter_context(session(options, out))
            wait_for_shards(process, out, num_shards)
            return process

        yield until_ray_starts(start)


@contextmanager
def session(options: list[str], out: Path) -> Iterator[subprocess.Popen]:
    """Yields the command, just started in a session of its own, of which no process outlives the block."""
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


def until_ray_starts[Started](start: Callable[[], Started]) -> Started:
    """Returns what `start` returns, which is called again where Ray is late; a warning tells each time.

    Raises:
        AssertionError: It was late `MOST_STARTS` times.
    """
    for number in range(1, MOST_STARTS + 1):
        try:
            return start()
        except RayIsLate as late:
            warnings.warn(f"start {number} of at most {MOST_STARTS} shows nothing: {late}", stacklevel=2)
    raise AssertionError(f"Ray was late {MOST_STARTS} times")


def check_ray(said: str) -> None:
    """Raises `RayIsLate` where a command said that it ended for this reason."""
    if RAY_IS_LATE in said:
        raise RayIsLate(said.strip())


def session_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns all processes of the command's session: the driver, Ray's own and the workers, orphans too."""
    members = []
    for member in psutil.process_iter():
        with suppress(ProcessLookupError):
            members += [member] if os.getsid(member.pid) == process.pid else []
    return members


def kill_worker(members: Iterable[psutil.Process], chance: random.Random) -> bool:
    """Kills one of the Ray workers among these processes that write a shard; returns whether there was one."""
    writers = []
    for member in members:
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
        RayIsLate: The command ended without having begun.
        AssertionError: It ended before there were so many, or is too slow.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while num_shards(out) < number:
        if process.poll() is not None:
            check_ray(said := process.communicate()[1])
            raise AssertionError(f"it ended with {process.returncode} before there were {number} shards: {said}")
        assert time.monotonic() < deadline, f"no {number} shards within {TIMEOUT_SECONDS} s"
        time.sleep(POLL_SECONDS)


def num_shards(out: Path) -> int:
    """Returns how many shards there are."""
    return len(list(out.glob("*.tar")))


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
