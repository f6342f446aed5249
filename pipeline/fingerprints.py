"""What a run knows its base folder by: digests of the tokenizer and of all that it starts from."""

import hashlib
from pathlib import Path

MIB = 1 << 20
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def base_fingerprint(base: Path) -> str:
    """Returns a digest of a base folder: its JSON files, and its weight files by size, first MiB and last MiB."""
    digest = hashlib.sha256()
    for file in sorted([*base.glob("*.json"), *base.glob("*.safetensors")]):
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            digest.update(stream.read(MIB))
            stream.seek(max(MIB, size - MIB))
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Returns a digest of the tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
