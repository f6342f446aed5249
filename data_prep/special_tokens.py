"""The special tokens of a tokenizer, read from its JSON files: texts that spell one mean something else in training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console import UsageError
from common.json_files import parse_json
from common.tokens import IMAGE_TOKEN


def read_special_tokens(folder: Path) -> tuple[str, ...]:
    """Returns the special tokens of the tokenizer in a folder, without the mark of an image.

    Raises:
        UsageError: There is no tokenizer that names any.
    """
    files = {name: folder / name for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")}
    try:
        contents = [parse_json(file.read_bytes()) for file in files.values() if file.is_file()]
        found = {token for content in contents for token in special_tokens(content)}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"--tokenizer {folder} cannot be read: {error}") from None
    if not found:
        raise UsageError(f"--tokenizer {folder} holds no {' or '.join(files)} that names special tokens")
    return tuple(sorted(found - {IMAGE_TOKEN}))


def special_tokens(content: dict[str, Any]) -> Iterator[str]:
    """Yields the special tokens that a tokenizer's file names, whichever of the three it is."""
    added = [*(content.get("added_tokens") or []), *(content.get("added_tokens_decoder") or {}).values()]
    yield from (token["content"] for token in added if token.get("special"))
    named = [value for key, value in content.items() if key.endswith("_token")]
    more = content.get("additional_special_tokens") or []
    for token in [*named, *(more if isinstance(more, list) else [])]:
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            yield text
