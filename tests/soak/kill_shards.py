"""Kills sharding again and again, at random moments, and compares what comes of it: `make soak`.

The same command is given again after each kill until it has finished. Then its folder must equal that of a run which
nobody disturbed, byte for byte, with every sample in it once and nothing else. The victims take turns: the driver (its
workers live on for a while, beside the next run), a worker (its run goes on without it), and the whole process group.
A run whose Ray was late shows nothing: it is counted apart, and too many of them are a failure.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

from tests.kills import (
    MOST_STARTS,
    NO_COMMIT,
    POLL_SECONDS,
    RAY_IS_LATE,
    command,
    contents,
    kill_worker,
    make_data,
    num_shards,
    run_to_end,
    sample_keys,
    session,
    session_of,
)

NUM_ROWS = 900
MOST_SHARDS, MOST_SECONDS = 60, 8.0  # until the next kill
LATE = "Ray was late"


def main() -> None:
    """Prints a line for each kill, each finished folder and each Ray that was late, and a verdict."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(NO_COMMIT)
    chance, victims = random.Random(options.seed), cycle(("driver", "worker", "group"))
    num_folders, events = 0, Counter()
    with tempfile.TemporaryDirectory(prefix="saisa-soak-") as name:
        whole, arguments = Path(name, "whole"), make_data(Path(name, "data"), NUM_ROWS)
        undisturbed = run_to_end(command(arguments, whole))
        assert undisturbed.returncode == 0, undisturbed.stderr
        assert sample_keys(whole) == [f"{position:09d}" for position in range(NUM_ROWS)]
        while (num_kills := events.total() - events[LATE]) < options.kills:
            out = Path(name, f"out-{num_folders}")
            for event in disturbed(arguments, out, victims, chance):
                events[event] += 1
                print(f"{event} ({events[event]}), after {num_shards(out)} shards", flush=True)
                if events[LATE] > MOST_STARTS:
                    sys.exit(f"FAILED: {LATE} {events[LATE]} times; run it where there is less to do")
            if differing := differences(contents(whole), contents(out)):
                sys.exit("FAILED: unlike in an undisturbed run:\n" + "\n".join(differing))
            num_folders += 1
            print(f"folder {num_folders}: finished, same bytes, nothing left behind", flush=True)
    told = ", ".join(f"{event} {count} times" for event, count in sorted(events.items()))
    print(f"PASSED: {num_kills} kills, {num_folders} folders, in each every one of {NUM_ROWS} samples once ({told})")


def disturbed(arguments: list[str], out: Path, victims: Iterator[str], chance: random.Random) -> Iterator[str]:
    """Yields what has happened: that a victim was killed, or that Ray was late; ends when the command has finished."""
    with ExitStack() as orphanage:
        while True:
            process = orphanage.enter_context(session(arguments, out))
            while wait(process, out, chance):
                if kill(victim := next(victims), process, chance):
                    yield f"killed: the {victim}"
            if process.returncode == 0:
                return
            if process.returncode != -signal.SIGKILL:
                said = process.communicate()[1]
                assert RAY_IS_LATE in said, said
                yield LATE


def wait(process: subprocess.Popen, out: Path, chance: random.Random) -> bool:
    """Returns at a random moment whether the command still runs: after some time, or some more shards."""
    seconds = chance.uniform(0, MOST_SECONDS) if chance.random() < 0.3 else float("inf")
    start, number = time.monotonic(), num_shards(out) + chance.randrange(MOST_SHARDS)
    while process.poll() is None and time.monotonic() - start < seconds and num_shards(out) <= number:
        time.sleep(POLL_SECONDS)
    return process.poll() is None


def kill(victim: str, process: subprocess.Popen, chance: random.Random) -> bool:
    """Returns whether the victim was killed; a worker is as soon as one writes a shard, unless the run ends first."""
    if victim == "worker":
        while process.poll() is None:
            if kill_worker(session_of(process), chance):
                return True
            time.sleep(POLL_SECONDS)
        return False
    if victim == "driver":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def differences(whole: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Returns a line for each file that is missing, is too much or has other bytes, with the first of these."""
    lines = []
    for name in sorted(whole.keys() | found.keys()):
        expected, got = whole.get(name), found.get(name)
        if expected is None or got is None:
            lines.append(f"{name}: {'left behind' if expected is None else 'missing'}")
        elif expected != got:
            pairs = enumerate(zip(expected, got, strict=False))
            at = next((position for position, (a, b) in pairs if a != b), min(len(expected), len(got)))
            start = max(0, at - 60)
            lines.append(f"{name}, byte {at}: {expected[start : at + 60]} became {got[start : at + 60]}")
    return lines


if __name__ == "__main__":
    main()
