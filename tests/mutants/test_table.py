"""The list of mistakes follows the code: what `make mutants` would replace is there, and so are its tests."""

import re
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", MUTANTS)
def test_every_mistake_has_its_place_and_its_tests(file):
    text = (ROOT / file).read_text()
    for old, new, tests in MUTANTS[file]:
        assert text.count(old) == 1 and old != new, f"{file}: {old!r} must stand there once; follow the code"
        for name in tests.split(", "):
            path, _, function = name.partition("::")
            found = (ROOT / "tests" / path).read_text()
            assert not function or re.search(rf"^def {function.partition('[')[0]}\(", found, re.MULTILINE), name
