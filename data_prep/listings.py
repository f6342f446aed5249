"""The two files that list a finished shard directory, and every reader's one way to them.

manifest.json   counts, the shards with their checksums, SHA-256 of the other listings, and of itself
index.json      the shards as mosaicml-streaming lists them

Whatever comes from outside is checked before anything is done with it: the fields, the names of files, that no byte
has changed since it was written, and that both list the same shards.

    {"version": 2, "fingerprint": ..., ..., "own_sha256": "<SHA-256 of this file with 64 zeros in this place>"}

plan.json ends in the same way; it tells the dates of images, so the manifest has a digest of its identity alone.
Version 1 had only the digests of tars and rejects.jsonl in its manifest, and none of a file in itself. It is read as
it was written; `make verify` says what to do.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.files import Location, read_whole
from data_prep.shard_names import check_shard_names

FORMAT = "saisa-tar"
AGAIN = "run the same `make shards` again"
MAX_LISTING_BYTES = 1 << 30  # some 600 bytes a shard
DIFFERS = "its bytes differ from the size and SHA-256 in the manifest"
DIFFERS_FROM_OWN = "its bytes differ from its own SHA-256"
OWN_DIGEST = "own_sha256"
END_BYTES = len(b'"\n}\n')  # what follows the digest of a file in itself


type Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
type Count = Annotated[int, Field(ge=0)]


class Damage(Exception):
    """A file that is not as it was written; the text says in what way."""


class Entry(BaseModel):
    """A part of a listing; what later versions add is kept and not looked at."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class FileDigest(Entry):
    """What a file holds."""

    bytes: Count
    sha256: Digest


class ShardEntry(Entry):
    """A shard in manifest.json."""

    tar: str
    sidecar: str
    sha256: Digest
    bytes: Count
    num_samples: Count
    num_images: Count
    num_rejected: Count
    sidecar_sha256: Digest | None = None


class SourceEntry(Entry):
    """The rows that shards were made from."""

    name: str


class ImagesEntry(Entry):
    """The images that shards were made from."""

    names: list[str]


class SourcesEntry(Entry):
    """What shards were made from."""

    data: SourceEntry
    images: ImagesEntry = ImagesEntry(names=[])


class CodeEntry(Entry):
    """What wrote the shards."""

    saisa: str
    pillow: str


class SettingsEntry(Entry):
    """The settings that shards were made with."""

    shard_bytes: Count


class Manifest(Entry):
    """manifest.json."""

    version: Literal[1, 2]
    fingerprint: Digest
    num_rows: Count
    num_samples: Count
    num_rejected: Count
    num_images: Count
    num_shards: Count
    num_bytes: Count
    shards: list[ShardEntry]
    rejects: FileDigest
    settings: SettingsEntry
    sources: SourcesEntry
    code: CodeEntry
    num_other_extensions: Count = 0
    identity_sha256: Digest | None = None
    index: FileDigest | None = None
    own_sha256: Digest | None = None

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        check_shard_names((shard.tar, shard.sidecar) for shard in self.shards)
        digests = [self.identity_sha256, self.index, self.own_sha256, *(shard.sidecar_sha256 for shard in self.shards)]
        if self.version > 1 and None in digests:
            raise ValueError("a checksum is missing")
        return self


class IndexFile(Entry):
    """A file in index.json."""

    basename: str
    bytes: Count
    hashes: dict[Literal["sha256"], Digest] = Field(min_length=1)


class IndexShard(Entry):
    """A shard in index.json: the fields of `streaming.base.format.base.reader.SplitReader`."""

    version: Literal[2]
    format: Literal["saisa-tar"]
    compression: None
    hashes: list[Literal["sha256"]]
    samples: Annotated[int, Field(ge=1)]
    size_limit: Count
    raw_data: IndexFile
    raw_meta: IndexFile
    zip_data: None
    zip_meta: None


class Index(Entry):
    """index.json; shards of which every row was refused are not in it."""

    version: Literal[2]
    shards: list[IndexShard]

    @model_validator(mode="after")
    def _check(self) -> "Index":
        check_shard_names((shard.raw_data.basename, shard.raw_meta.basename) for shard in self.shards)
        return self


class Listings(NamedTuple):
    """What a finished directory says of itself."""

    manifest: Manifest
    index: Index


def read_listings(folder: Location) -> Listings:
    """Returns the listings of a shard directory as they are now, every byte as it was written.

    Raises:
        ValueError: The directory is not finished, or its listings are damaged or not of the same shards.
    """
    listings, damage = inspect_listings(folder)
    for name, what in damage.items():
        raise ValueError(f"{folder / name} is damaged ({what}); delete it and {AGAIN}")
    return listings


def read_manifest(folder: Location) -> Manifest:
    """Returns manifest.json alone, every byte as it was written.

    Raises:
        ValueError: It is missing or damaged.
    """
    manifest, damage = _inspect_manifest(folder)
    if damage:
        raise ValueError(f"{folder / 'manifest.json'} is damaged ({damage}); delete it and {AGAIN}")
    return manifest


def inspect_listings(folder: Location) -> tuple[Listings, dict[str, str]]:
    """Returns the listings of a shard directory, and those that are not as they were written, with what shows it.

    Raises:
        ValueError: There are none, or they are too damaged to say which shards there are.
    """
    manifest, wrong = _inspect_manifest(folder)
    damage = {"manifest.json": wrong} if wrong else {}
    data = read_listing(folder, "index.json")
    index = _parse(Index, folder / "index.json", data)
    if manifest.index not in (None, file_digest(data)):
        damage["index.json"] = DIFFERS
    if not _agree(manifest, index):
        wrong = " and ".join(damage) or "manifest.json or index.json"
        raise ValueError(f"{folder}: {wrong} is damaged (they list different shards); delete both and {AGAIN}")
    return Listings(manifest, index), damage


def _inspect_manifest(folder: Location) -> tuple[Manifest, str]:
    """Returns the manifest and, if it is not as it was written, what shows it."""
    data = read_listing(folder, "manifest.json")
    manifest = _parse(Manifest, folder / "manifest.json", data)
    if manifest.version > 1 and not has_own_digest(data):
        return manifest, DIFFERS_FROM_OWN
    same = manifest.fingerprint == fingerprint(shard.sha256 for shard in manifest.shards)
    return manifest, "" if same else "its fingerprint is not that of its shards"


def read_listing(folder: Location, name: str) -> bytes:
    """Returns the bytes of a listing.

    Raises:
        ValueError: It is not there, or larger than that of the most shards.
    """
    try:
        return read_whole(folder / name, MAX_LISTING_BYTES)
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged ({error}); delete it and {AGAIN}") from None
    except (FileNotFoundError, NotADirectoryError):
        if not any((folder / begun).exists() for begun in ("plan.json", "manifest.json")):
            raise ValueError(f"{folder}: no shards here; name what `make shards` wrote") from None
        raise ValueError(f"{folder} is not finished, it has no {name}; {AGAIN}") from None


def _parse[Listing: Entry](kind: type[Listing], file: Location, data: bytes) -> Listing:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        told = str(first.get("ctx", {}).get("error", first["msg"]))
        told = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), told])
        raise ValueError(f"{file} is damaged ({told}); delete it and {AGAIN}") from None


def _agree(manifest: Manifest, index: Index) -> bool:
    listed = [shard for shard in manifest.shards if shard.num_samples]
    return len(listed) == len(index.shards) and all(map(_same, listed, index.shards))


def _same(shard: ShardEntry, entry: IndexShard) -> bool:
    tar, sidecar = entry.raw_data, entry.raw_meta
    found = (tar.basename, tar.bytes, tar.hashes["sha256"], entry.samples, sidecar.basename)
    same = found == (shard.tar, shard.bytes, shard.sha256, shard.num_samples, shard.sidecar)
    return same and shard.sidecar_sha256 in (None, sidecar.hashes["sha256"])


def fingerprint(tar_digests: Iterable[str]) -> str:
    """Returns what names a shard set: a hash of the SHA-256 of its tars, and of nothing else."""
    return hashlib.sha256("\n".join(tar_digests).encode()).hexdigest()


def file_digest(data: bytes) -> FileDigest:
    """Returns how a manifest tells what a file holds."""
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def identity_digest(identity: dict[str, Any]) -> str:
    """Returns how a manifest tells what its shards were made from: the SHA-256 of the identity in plan.json."""
    return hashlib.sha256(pretty(identity)).hexdigest()


def with_own_digest(content: dict[str, Any]) -> bytes:
    """Returns the bytes of a listing that end with their own digest."""
    content = {key: value for key, value in content.items() if key != OWN_DIGEST}
    return pretty(content | {OWN_DIGEST: _own_digest(pretty(content | {OWN_DIGEST: "0" * 64}))})


def has_own_digest(data: bytes) -> bool:
    """Whether every byte of a listing is as `with_own_digest` made it."""
    return data[-64 - END_BYTES : -END_BYTES] == _own_digest(data).encode()


def _own_digest(data: bytes) -> str:
    blank = data[: -64 - END_BYTES] + b"0" * 64 + data[-END_BYTES:]
    return hashlib.sha256(blank).hexdigest()


def pretty(value: dict[str, Any]) -> bytes:
    """Returns JSON to look at, as the listings that nobody streams are written."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
