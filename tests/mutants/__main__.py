"""`make mutants`: plants each mistake of the table in a copy of the code, and reports those that no test notices.

The working tree is never touched. First all tests must pass without a mistake; then each mistake has its own process,
forked from this one, which has imported the libraries and nothing of the project.
"""

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from common.console import UsageError, run
from tests.mutants.table import MUTANTS
from tests.source_files import ROOT, source_files

FOLDERS = ("benchmarks", "common", "configs", "data_prep", "model", "orchestration", "pipeline", "tests")
LIBRARIES = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.backends",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "streaming",
    "torchvision.io",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
)
LIMIT_SECONDS = 600  # a mistake that lets the tests run for longer is noticed, too
NO_TESTS = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.INTERNAL_ERROR)


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file`, `new` in the place of `old`, which `tests` should notice."""

    file: str
    old: str
    new: str
    tests: str

    def plant(self, folder: Path) -> str:
        """Makes the mistake in a copy of the code; returns a line for people.

        Raises:
            ValueError: The text does not stand there once: the table must follow the code.
        """
        text = (folder / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"tests/mutants/table.py: {self.file} has {self.old!r} {count} times; it must be once")
        (folder / self.file).write_text(text.replace(self.old, self.new))
        old, new = (" ".join(part.split()) for part in (self.old, self.new))
        return f"{self.file}:{text[: text.index(self.old)].count(chr(10)) + 1}: {old} -> {new or 'nothing'}"


def mutants() -> list[Mutant]:
    """Returns all mistakes of the table."""
    return [Mutant(file, *row) for file, rows in MUTANTS.items() for row in rows]


def main(
    only: Annotated[str, typer.Option(help="files that contain this")] = "",
    processes: Annotated[int, typer.Option(help="at a time")] = 2,
    baseline: Annotated[bool, typer.Option(help="first see that all the tests pass without a mistake")] = True,
) -> None:
    """Plants mistakes and reports those that no test notices."""
    chosen = [mutant for mutant in mutants() if only in mutant.file]
    if not chosen:
        raise UsageError(f"--only {only}: no file of tests/mutants/table.py contains this")
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="saisa-mutants-") as folder:
        copies = [copy_tree(Path(folder, str(number))) for number in range(processes)]
        if baseline:
            print("without a mistake:", flush=True)
            tests = sorted({name for mutant in chosen for name in mutant.tests.split(", ")})
            pid = start(copies[0], tests, Path(folder, "baseline"))
            if os.waitpid(pid, 0)[1]:
                raise ValueError(f"tests fail without any mistake:\n{Path(folder, 'baseline').read_text()[-4000:]}")
        survivors = run_all(chosen, copies, Path(folder))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mistakes noticed")
    if survivors:
        raise ValueError("nobody notices:\n" + "\n".join(f"  {name}" for name in survivors))


def import_libraries() -> None:
    """Imports what every process would, as the tests' own configuration does."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # two mistakes may have one size and time
    for name in ("tests.no_gpu", *LIBRARIES):
        importlib.import_module(name)


def copy_tree(target: Path) -> Path:
    """Returns a copy of the code and the tests, with what is not committed too, sharing the environment."""
    for path in (*source_files(FOLDERS), Path("pyproject.toml")):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target / path)
    (target / ".venv").symlink_to((ROOT / ".venv").resolve())
    return target


def run_all(chosen: Iterable[Mutant], copies: list[Path], logs: Path) -> list[str]:
    """Returns the mistakes that the tests let pass; prints a line for each, as it is known."""
    free, running, survivors = list(copies), {}, []

    def finish() -> None:
        pid, status = os.wait()
        name, mutant, before, copy, log, started = running.pop(pid)
        end_group(pid)
        (copy / mutant.file).write_text(before)
        free.append(copy)
        code = os.waitstatus_to_exitcode(status)
        if code in NO_TESTS:
            raise ValueError(f"{name}: {mutant.tests} cannot be run:\n{log.read_text()[-2000:]}")
        if code == 0:
            survivors.append(name)
        print(f"{time.monotonic() - started:4.0f} s  {told(code, log.read_text())}  {name}", flush=True)

    for mutant in chosen:
        if not free:
            finish()
        copy = free.pop()
        before, log = (copy / mutant.file).read_text(), logs / f"{copy.name}.log"
        name = mutant.plant(copy)
        pid = start(copy, mutant.tests.split(", "), log)
        running[pid] = (name, mutant, before, copy, log, time.monotonic())
    while running:
        finish()
    return survivors


def told(code: int, log: str) -> str:
    """Returns what became of a mistake: the first test that failed, the signal of its end, or that it lives."""
    if code == 0:
        return "SURVIVED"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", log, re.MULTILINE)
    return f"noticed by {failed[1] if failed else f'exit status {code}'}"


def start(copy: Path, tests: Iterable[str], log: Path) -> int:
    """Returns the process that runs tests in a copy of the code; its group holds all that it starts."""
    if pid := os.fork():
        return pid
    os.setsid()
    signal.alarm(LIMIT_SECONDS)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in FOLDERS]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    options = ["-x", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", f"{copy}-tmp", "--tb", "short"]
    code = pytest.main([*options, *(f"tests/{name}" for name in tests)])
    os._exit(code)


def end_group(group: int) -> None:
    """Ends what a process has left behind."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    run(main)
