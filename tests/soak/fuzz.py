"""Damages listings and checkpoints at random and reads them: refused in one line or read, nothing outside touched.

`tests/pipeline/test_fuzz.py` does it a few hundred times, in `make soak` some thousands. What was redone after the
damage, digests and fingerprint, is as somebody would do it who wants it to be believed.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import torch

from data_prep.listings import file_digest, fingerprint, with_own_digest
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.shards.shard_set import ShardSet
from tests.watch import snapshot

STRANGE = [
    "../victim", "../../victim", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "shard-000000.tar", "\ud800", "x" * 5000,
    None, True, -1, 0, 1 << 70, 1e400, float("nan"), [], {}, [[]], {"a": {}}, "0" * 64, "file:///etc/passwd",
]  # fmt: skip


def mutate_value(value: object, rng: random.Random) -> object:
    """Returns parsed JSON with one value in it, anywhere, made strange, removed or doubled."""
    spots: list[tuple[dict | list, str | int]] = []

    def collect(inner: object) -> None:
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, below in pairs:
            spots.append((inner, key))  # type: ignore
            collect(below)

    collect(value)
    holder, key = rng.choice(spots)
    if rng.random() < 0.2:
        del holder[key]  # type: ignore
    else:
        holder[key] = rng.choice(STRANGE)  # type: ignore
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes of which some are changed, cut off or put in."""
    changed, offset = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        changed[offset] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[offset:]
    elif kind == 2:
        changed[offset:offset] = rng.randbytes(rng.randrange(1, 40))
    else:
        changed[offset : offset + rng.randrange(1, 40)] = rng.randbytes(20)
    return bytes(changed)


def attempt(read: Callable[[], bool], found: Counter, watched: Path, before: dict) -> None:
    """Counts what reading does; anything but a `ValueError` or `OSError` of one line is raised."""
    try:
        found["read equal" if read() else "read as what it says"] += 1
    except (ValueError, OSError) as error:
        assert "\n" not in str(error), str(error)
        found["refused"] += 1
    assert snapshot(watched) == before


def fuzz_listings(store: Path, work: Path, count: int, seed: int = 0) -> Counter:
    """Returns how many of `count` stores with a mutated listing, or sidecar, were refused and how many read."""
    rng, found, whole = random.Random(seed), Counter(), ShardSet(store)
    expected = [whole.members(number) for number in range(len(whole))]
    watched = work / "watched"
    (watched / "cache parent").mkdir(parents=True)
    (watched / "victim").write_text("mine")
    before = snapshot(watched)
    for number in range(count):
        out, cache = work / "inside" / "store", work / "inside" / "cache"
        copytree(store, out)
        name = rng.choice(["index.json", "manifest.json", whole.readers[0].sidecar_path.name])
        data = (out / name).read_bytes()
        if rng.random() < 0.6:
            data = json.dumps(mutate_value(json.loads(data), rng)).encode()
        else:
            data = mutate_bytes(data, rng)
        (out / name).write_bytes(data)
        if rng.random() < 0.7:
            believe_listings(out)
        location = f"file://{out}" if number % 2 else str(out)

        def read(location: str = location, cache: Path = cache) -> bool:
            shards = ShardSet(location, cache, 10**9)
            shards.stream.download_retry = 1
            return [shards.members(n) for n in range(len(shards))] == expected

        attempt(read, found, watched, before)
        rmtree(work / "inside")
    return found


def believe_listings(out: Path) -> None:
    """Makes digests, sizes and fingerprint of a store agree with what is there, as far as there is anything to read."""
    try:
        index, manifest = (json.loads((out / name).read_bytes()) for name in ("index.json", "manifest.json"))
        sidecars = {}
        for entry in index["shards"]:
            data = (out / entry["raw_meta"]["basename"]).read_bytes()
            sidecars[entry["raw_meta"]["basename"]] = hashlib.sha256(data).hexdigest()
            entry["raw_meta"] |= {"bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}
        for shard in manifest["shards"]:
            shard["sidecar_sha256"] = sidecars.get(shard["sidecar"], shard.get("sidecar_sha256"))
        manifest["fingerprint"] = fingerprint(shard["sha256"] for shard in manifest["shards"])
        data = json.dumps(index).encode()
        manifest["index"] = file_digest(data).model_dump()
        (out / "index.json").write_bytes(data)
        (out / "manifest.json").write_bytes(with_own_digest(manifest))
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        pass  # too broken for its author too


def fuzz_checkpoints(step: Path, work: Path, count: int, seed: int = 0) -> Counter:
    """Returns the same of checkpoints of which a file was mutated, its digest redone for two in three."""
    rng, found, expected = random.Random(seed), Counter(), load_trained_parameters(step)
    watched = work / "watched"
    watched.mkdir(parents=True)
    (watched / "victim").write_text("mine")
    before = snapshot(watched)
    for _ in range(count):
        out = work / "inside" / step.name
        copytree(step, out)
        file = rng.choice([out / ".metadata", *sorted(out.glob("*"))])
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        if rng.random() < 0.67 and file.name != "integrity.json":
            listing = json.loads((out / "integrity.json").read_text())
            listing["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            (out / "integrity.json").write_text(json.dumps(listing))

        def read(out: Path = out) -> bool:
            loaded = load_trained_parameters(out)
            same = loaded.keys() == expected.keys()
            return same and all(torch.equal(loaded[name], expected[name]) for name in expected)

        attempt(read, found, watched, before)
        rmtree(work / "inside")
    return found
