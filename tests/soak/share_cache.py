"""Kills readers that share a cache again and again, at random moments, and damages what they share: `make soak`.

Four processes at a time read random samples and download ahead, with room for three of eight shards between them. Every
sample that one of them gets must be right, and the shards in the cache must never exceed its limit.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from filelock import FileLock

from pipeline.shards.shard_set import ShardSet
from tests.shard_sets import write_shards

NUM_READERS, READER_SECONDS, POLL_SECONDS = 4, 3.0, 0.05


def main() -> None:
    """Prints a verdict."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, readers = random.Random(options.seed), set()
    num_kills = num_ended = num_started = peak = 0
    with tempfile.TemporaryDirectory(prefix="saisa-soak-") as name:
        folder, cache = write_shards(Path(name, "shards"), Path(name, "work")), Path(name, "cache")
        shards = ShardSet(folder)
        expected = [shards.members(number) for number in range(len(shards))]
        limit = 3 * max(reader.raw_data.bytes for reader in shards.readers)
        while num_kills < options.kills or readers:
            while len(readers) < NUM_READERS and num_kills < options.kills:
                num_started += 1
                readers.add(start_reader(f"file://{folder}", cache, limit, expected, num_started))
            time.sleep(POLL_SECONDS)
            peak = max(peak, cached_bytes(cache))
            if chance.random() < 0.1:
                os.kill(chance.choice(sorted(readers)), signal.SIGKILL)
            while readers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                readers.remove(ended[0])
                if os.WIFEXITED(ended[1]) and os.WEXITSTATUS(ended[1]):
                    sys.exit("FAILED: see above")
                num_kills, num_ended = num_kills + os.WIFSIGNALED(ended[1]), num_ended + os.WIFEXITED(ended[1])
        last = ShardSet(f"file://{folder}", cache, limit)
        assert [last.members(number) for number in range(len(last))] == expected
        assert peak <= limit, f"{peak} bytes in a cache of {limit}"
        assert not list(cache.glob("*/*.tar.*.part")), "what the killed left is still there"
    print(f"PASSED: {num_kills} kills, {num_ended} readers ended, at most {peak / limit:.0%} of the limit in the cache")


def start_reader(location: str, cache: Path, limit: int, expected: list[dict[str, bytes]], seed: int) -> int:
    """Returns the process id of a reader, which exits with 0 unless a sample is wrong or an error comes up."""
    if pid := os.fork():
        return pid
    try:
        chance = random.Random(seed)
        if chance.random() < 0.3:
            damage(cache, chance)
        shards, end = ShardSet(location, cache, limit), time.monotonic() + READER_SECONDS * chance.random()
        while time.monotonic() < end:
            shards.prefetch(chance.sample(range(len(shards.shard_sizes)), 3))
            number = chance.randrange(len(shards))
            assert shards.members(number) == expected[number], f"sample {number} is wrong"
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def damage(cache: Path, chance: random.Random) -> None:
    """Overwrites a few bytes of a random tar in the cache, if one stays there for so long."""
    if tars := sorted(cache.glob("*/*.tar")):
        try:
            with chance.choice(tars).open("r+b") as file:
                file.seek(chance.randrange(1000))
                file.write(b"XXXX")
        except FileNotFoundError:
            pass


def cached_bytes(cache: Path) -> int:
    """Returns the bytes of all tars in the cache while nobody may make room."""
    with FileLock(cache / ".lock"):
        return sum(path.stat().st_size for path in list(cache.glob("*/*.tar")) if path.exists())


if __name__ == "__main__":
    main()
