"""Errors of several processes: told once where they are the same, never hidden where they are not."""

import errno
import os
import sys
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
import typer

from common.console import UsageError, command
from pipeline.distributed import broadcast_from_rank0, initialize_distributed, shutdown_distributed, told_once
from tests.processes import run_together


def said_of(function) -> str:
    """Returns what a command prints that ends with an error."""
    with redirect_stderr(StringIO()) as said, pytest.raises(typer.Exit):
        command(told_once()(function))()
    return said.getvalue()


def fails_on_all() -> list[str]:
    def full_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")

    def only_one() -> None:
        rank = torch.distributed.get_rank()
        raise ValueError("the same everywhere" if rank != 1 else "only here")

    def usage() -> None:
        raise UsageError("a wrong setting")

    initialize_distributed()
    said = [said_of(lambda: broadcast_from_rank0(full_disk)), said_of(only_one), said_of(usage)]
    shutdown_distributed()
    return said


def test_an_error_that_several_have_is_printed_by_one():
    said = run_together(3, fails_on_all)
    full, own, usage = ([each for each in told if each] for told in zip(*said, strict=True))
    assert len(full) == 1 and "/dev/full: No space left on device; " in full[0]
    assert sorted(line.partition("): ")[2] for line in own) == ["only here\n", "the same everywhere\n"]
    assert usage == ["error (process 0): a wrong setting\n"]  # the first of each machine


def loses_a_process() -> str:
    initialize_distributed()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        sys.stdout.flush()
        os.kill(os.getpid(), 9)
    return said_of(lambda: torch.distributed.all_reduce(torch.zeros(3)))


def test_a_lost_process_is_one_line_of_the_others():
    with pytest.raises(RuntimeError) as error:
        run_together(2, loses_a_process)
    assert str(error.value) == "process 1 of 2: died"  # the other returned its line, as below


def lost_connection() -> str:
    def reduce() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:44700")

    return said_of(reduce)


def test_what_it_says_is_where_to_look():
    assert lost_connection().startswith("error: the connection to another process of this run is lost; what that one")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), told_once():
        raise RuntimeError("a bug")
