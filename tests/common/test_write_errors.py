"""What a full disk looks like through the libraries that write here, and that each is told as what it is."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from common.console import describe
from common.files import named_errors
from common.write_errors import os_error_in
from tests.full_disk import no_file_larger_than

TOKENIZER = Tokenizer(models.WordLevel({str(number): number for number in range(500)}, unk_token="0"))
WRITERS = {
    "python": lambda file: file.write_text("x" * 5000),
    "torch": lambda file: torch.save(torch.zeros(5000), file.open("wb")),
    "safetensors": lambda file: save_file({"a": torch.zeros(5000)}, file),
    "tokenizers": lambda file: TOKENIZER.save(str(file)),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_library_says_the_systems_error(tmp_path, writer):
    file = tmp_path / "file"
    with no_file_larger_than(1000), pytest.raises(OSError) as error, named_errors(file):
        writer(file)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(file))
    assert describe(error.value) == (
        f"{file}: File too large; no file may be that large there: raise the limit (see `ulimit -f`), then start again"
    )


def test_a_full_disk_says_what_is_free(tmp_path):
    with pytest.raises(OSError) as error, named_errors("/dev/full"), open("/dev/full", "w") as full:
        full.write("x")
    error.value.filename = str(tmp_path / "not/there")
    status = os.statvfs(tmp_path)
    assert f"{tmp_path}/not/there: No space left on device; " in describe(error.value)
    assert f" are free in {tmp_path}: make room, then start again" in describe(error.value)
    assert status.f_bavail  # else the line is about inodes


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path):
    try:
        (tmp_path / "none").read_bytes()
    except OSError:
        with pytest.raises(RuntimeError, match="a bug"), named_errors(tmp_path):
            raise RuntimeError("a bug") from None
    assert os_error_in(RuntimeError("a bug")) is None
