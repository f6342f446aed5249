"""Whatever is killed, and whenever: the same command finishes the work, every sample once, same bytes as a calm run."""

import os
import random
import re
import signal
import subprocess
import tempfile
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from ray._private.utils import validate_socket_filepath

from common.console import UsageError, describe
from common.files import local_copy, locked, open_location, whole_file, write_whole
from data_prep import runner
from data_prep.plan import Settings
from data_prep.shards import make_shards
from data_prep.tables import Spool
from tests.full_disk import no_file_larger_than
from tests.kills import (
    MOST_STARTS,
    POLL_SECONDS,
    check_ray,
    command,
    contents,
    kill_worker,
    make_data,
    run_to_end,
    running,
    sample_keys,
    until_ray_starts,
    wait_for_shards,
)

pytestmark = pytest.mark.usefixtures("local_ray")
NUM_ROWS, SETTINGS = 200, Settings(shard_bytes=60_000)
IN_A_NAMESPACE = ["unshare", "--mount", "--map-root-user", "sh", "-euc"]
ON_A_SMALL_DISK = """
out=$1; larger=$2; shift 2
mount -t tmpfs -o size=2m none "$out"
"$@" && exit 1
cp -aT "$out" "$larger"
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The options for a data set, and the shards of a run that nothing disturbed, with every row in them once."""
    folder = tmp_path_factory.mktemp("calm")
    options = make_data(folder, NUM_ROWS)
    make_shards(options[1], options[3], folder / "out", SETTINGS)
    assert sample_keys(folder / "out") == [f"{place:09d}" for place in range(NUM_ROWS)]
    return options, folder / "out"


def finish(options: list[str], out: Path) -> dict[str, bytes]:
    """Returns what is in `out` after the same command, given again (here, to share this process's Ray)."""
    make_shards(options[1], options[3], out, SETTINGS)
    return contents(out)


@pytest.mark.parametrize("victim", [pytest.param("driver", marks=pytest.mark.slow), "group"])
def test_a_killed_run_is_finished_by_the_same_command(calm, tmp_path: Path, victim: str) -> None:
    options, whole = calm
    out = tmp_path / "out"
    with running(options, out, random.Random(victim).randrange(1, 40)) as process:
        if victim == "driver":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = os.listdir(out)
        assert ".lock" in left and "manifest.json" not in left
        assert finish(options, out) == contents(whole)  # while orphans of the first run may still be writing


def test_killed_workers_are_replaced_during_the_run(calm, local_ray: str, tmp_path: Path) -> None:
    options, whole = calm
    out, chance, num_killed = tmp_path / "out", random.Random(0), 0
    with running([*options, "--address", local_ray], out, 2) as process:
        for number in (2, 15, 30):
            wait_for_shards(process, out, number)
            # Workers are children of the Ray that this process has started
            while process.poll() is None and not kill_worker(psutil.Process().children(recursive=True), chance):
                time.sleep(POLL_SECONDS)
            num_killed += process.poll() is None
        said = process.communicate()[1]
    assert process.returncode == 0 and num_killed >= 2, said
    assert f"{NUM_ROWS} rows = {NUM_ROWS} samples + 0 refused" in said
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_a_second_run_is_refused_and_an_interrupted_one_ends_cleanly(calm, tmp_path: Path) -> None:
    options, whole = calm
    out = tmp_path / "out"
    with running(options, out, 5) as process:
        process.send_signal(signal.SIGSTOP)  # or it might have finished before it is interrupted
        with pytest.raises(ValueError, match=f"another run is writing to {out}; wait for it or stop it"):
            finish(options, out)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        process.send_signal(signal.SIGCONT)
        said = process.communicate()[1]
    left = os.listdir(out)
    assert process.returncode > 0 and "Traceback" not in said
    assert "manifest.json" not in left and not [name for name in left if name == ".lock" or name.endswith(".part")]
    assert finish(options, out) == contents(whole)


@pytest.mark.slow
def test_a_full_disk_is_named_and_room_is_all_it_takes(calm, tmp_path: Path) -> None:
    options, whole = calm
    probe = subprocess.run([*IN_A_NAMESPACE, 'mount -t tmpfs none "$0"', tmp_path], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs mount namespaces (unshare --mount --map-root-user): {probe.stderr.strip()}")
    out, larger = tmp_path / "out", tmp_path / "larger"
    out.mkdir()
    run = run_to_end([*IN_A_NAMESPACE, ON_A_SMALL_DISK, "sh", out, larger, *command(options, out)])
    assert run.returncode == 0, run.stderr
    last = run.stderr.splitlines()[-1]
    assert re.fullmatch(rf"error: {out}/shard-\d+\.(tar|json): No space left on device", last)
    left = os.listdir(larger)
    assert "shard-000000.tar" in left and "manifest.json" not in left
    assert not [name for name in left if name == ".lock" or name.endswith(".part")]
    assert finish(options, larger) == contents(whole)


def test_a_file_that_cannot_grow_is_named_and_its_predecessor_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_whole(path, b"old")
    store = open_location("memory://faults/a.tar")
    with no_file_larger_than(100_000):
        with pytest.raises(OSError, match="File too large") as here:
            write_whole(path, bytes(200_000))
        with pytest.raises(OSError, match="File too large") as there, whole_file(store) as file:
            file.write(bytes(200_000))
    assert here.value.filename == str(path) and there.value.filename == tempfile.gettempdir()
    assert contents(tmp_path) == {"a.tar": b"old"} and not store.exists()


def test_a_temporary_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tables are laid down there, which is known at the latest when they are closed; so are copies of JSON."""
    row = {"conversations": [{"from": "human", "value": "x" * 2000}]}
    for use in (Spool.flush, lambda spool: spool.find(0, "a"), lambda spool: None):
        with no_file_larger_than(1000), pytest.raises(OSError) as full, closing(Spool(tmp_path)) as spool:
            spool.add({**row, "image": {"path": "a", "bytes": b"x"}})
            spool.add(row)
            use(spool)
        assert describe(full.value).startswith(f"{tmp_path}/images: File too large; ")
    store = open_location("memory://faults/rows.json")
    write_whole(store, bytes(2000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with no_file_larger_than(1000), pytest.raises(OSError) as full, local_copy(store):
        pass
    assert describe(full.value).startswith(f"{tmp_path}/saisa-") and "File too large; " in describe(full.value)


def test_a_late_ray_is_told_and_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", Mock(side_effect=Exception("The current node timed out during startup.")))
    with pytest.raises(ValueError) as late:
        runner._start(workers=1)
    said = iter([f"error: {late.value}\n"] * 2 + ["error: another\n"])
    with pytest.warns(UserWarning, match="shows nothing: error: .*timed out during startup") as told:
        until_ray_starts(lambda: check_ray(next(said)))
    assert len(told) == 2 and not list(said)
    with pytest.warns(UserWarning) as told, pytest.raises(AssertionError, match=f"Ray was late {MOST_STARTS} times"):
        until_ray_starts(lambda: check_ray(f"error: {late.value}\n"))
    assert len(told) == MOST_STARTS


def test_ray_is_started_once_more_and_no_more(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    late = Exception("The current node timed out during startup.")
    monkeypatch.setattr("ray.init", start := Mock(side_effect=[late, None, late]))
    runner._start(workers=1)
    assert start.call_count == 2 and start.call_args_list[0] == start.call_args_list[1]
    assert "timed out during startup.); trying once more" in capfd.readouterr().err


def test_a_temporary_folder_with_a_long_name_is_named_with_the_way_out(tmp_path: Path) -> None:
    """Ray's own check is the judge: it takes the longest folder that we take, and none that is longer."""
    socket = f"/ray/session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{2**22}/sockets/plasma_store"
    short, long = ("/" + "t" * (runner.MAX_TEMPORARY_BYTES - 1 + more) for more in (0, 1))
    validate_socket_filepath(short + socket)
    with pytest.raises(OSError, match="AF_UNIX path length"):
        validate_socket_filepath(long + socket)
    for accepted in ({}, {"TMPDIR": short}, {"TMPDIR": long, "RAY_TMPDIR": "/tmp"}):
        runner.check_temporary_folder(accepted)
    for name in ("TMPDIR", "RAY_TMPDIR"):
        with pytest.raises(UsageError, match=f"^{name}={long} has 40 bytes.*; set RAY_TMPDIR to a folder with a short"):
            runner.check_temporary_folder({name: long})


def test_a_lock_counts_only_as_long_as_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: (tmp_path / ".lock").unlink())  # its holder ends at this moment
    with pytest.raises(ValueError, match="another run is writing to"), locked(tmp_path):
        pass
