"""Kills training again and again, at random moments, and compares what comes of it: `make soak`.

The same run is started again after each kill until it has finished. Whatever then bears the name of a checkpoint must
be whole, and no more steps may be lost than the settings allow. At the end the losses and the weights must be those of
a run that nobody disturbed, bit by bit. A kill takes a whole process group: ranks, and what they forked to write.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from data_prep.shapes import write_dataset
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.checkpoint.run_info import latest_checkpoint, read_info
from pipeline.config import RunConfig
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from tests.processes import new_store, rendezvous, with_trainer
from tests.world import DEEP_SIZES, World, build_world

TIMEOUT_SECONDS, POLL_SECONDS = 240, 0.0005
SAVE_EVERY, KEEP_LAST, NUM_STEPS = 2, 2, 24
TOPOLOGIES = {
    "one process, writing in the background": (1, {"checkpoint__in_background": True}),
    "two processes, pp=2": (2, {"parallel__pp": 2}),
    "two processes, tp=2, writing in the background": (2, {"parallel__tp": 2, "checkpoint__in_background": True}),
}

type Moment = Callable[[], bool]
"""Tells whether it has come, again and again from the start of a run."""


def main() -> None:
    """Prints a line for each kill and each finished run, and a verdict."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    chance, activities, num_runs, most_lost = random.Random(options.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory(prefix="saisa-soak-") as name:
        write_dataset(Path(name, "data"), num_train=60, num_test=8, seed=0, image_size=64)
        world = build_world(Path(name), DEEP_SIZES)
        stage1 = world.config("demo-stage1", Path(name, "stage1"), train__max_steps=2)
        run_undisturbed(1, stage1)
        for number, (topology, (num_processes, changes)) in enumerate(TOPOLOGIES.items(), start=1):
            whole = soak_config(world, stage1, Path(name, f"whole-{number}"), **changes)
            seconds = run_undisturbed(num_processes, whole)
            print(f"{topology}: {seconds:.1f} s undisturbed", flush=True)
            while activities.total() < options.kills * number / len(TOPOLOGIES):
                num_runs += 1
                config = soak_config(world, stage1, Path(name, f"run-{num_runs}"), **changes)
                moments = random_moments(config.run_dir, seconds, chance)
                for kill in kill_again_and_again(num_processes, config, moments):
                    activities[kill.activity] += 1
                    most_lost = max(most_lost, kill.num_lost)
                    print(f"kill {activities.total()}: {kill}", flush=True)
                check_same_run(config, whole)
                print(f"run {num_runs}: finished, bit for bit, nothing left behind", flush=True)
    told = ", ".join(f"{count} {activity}" for activity, count in sorted(activities.items()))
    print(f"PASSED: {activities.total()} kills ({told}), {num_runs} runs, at most {most_lost} steps lost by a kill")


def soak_config(world: World, stage1: RunConfig, run_dir: Path, **changes: object) -> RunConfig:
    """Returns a stage 2 of some seconds that saves as often as it can."""
    settings = {"train__max_steps": NUM_STEPS, "train__num_epochs": 9, "init__projector": stage1.run_dir}
    saving = {"checkpoint__save_every_steps": SAVE_EVERY, "checkpoint__keep_last": KEEP_LAST}
    return world.config("demo-stage2", run_dir, **settings, **saving, **changes)


@dataclass(frozen=True)
class Kill:
    """What a kill left behind: steps finished, the step of the last checkpoint, what the run was doing."""

    num_finished: int
    num_saved: int
    activity: str

    @property
    def num_lost(self) -> int:
        """Steps that the next start trains again."""
        return max(0, self.num_finished - self.num_saved)

    def __str__(self) -> str:
        return f"{self.activity}; step {self.num_finished} finished, {self.num_saved} saved, {self.num_lost} lost"


def kill_again_and_again(num_processes: int, config: RunConfig, moments: Iterator[Moment]) -> Iterator[Kill]:
    """Yields what each kill left; ends when the run has finished, which is killed no more once no moments are left.

    Raises:
        AssertionError: A checkpoint is not whole, too many steps are lost, or the run ended with an error.
    """
    # What is being written in the background when the next checkpoint is due is waited for before that is begun.
    most_lost = config.checkpoint.save_every_steps * (2 if config.checkpoint.in_background else 1)
    num_saved = 0
    while True:
        moment = next(moments, lambda: False)
        started = time.time_ns()
        with running(num_processes, config) as run:
            was_killed = run.kill_at(moment)
        said = run.said.read_text()
        assert was_killed or run.process.exitcode == 0, f"exit status {run.process.exitcode}: {said}"
        resumed = re.search(r"from step (\d+);", said)
        assert not resumed or int(resumed[1]) == num_saved, f"{num_saved} steps were saved, but it went on {resumed[0]}"
        before, num_saved = num_saved, check_checkpoints(config.run_dir)
        assert num_saved >= before, f"step {before} was saved and is gone"
        if not was_killed:
            return
        kill = Kill(num_finished_steps(config.run_dir), num_saved, activity_at_kill(config.run_dir, started, said))
        assert kill.num_lost <= most_lost, f"{kill}; {most_lost} are allowed"
        yield kill


def random_moments(run_dir: Path, seconds: float, chance: random.Random) -> Iterator[Moment]:
    """Yields moments of a run that takes `seconds`: any, or while a checkpoint is written, named or an old one removed.

    What is watched for is the first or a later checkpoint after the start; half of the time, the kill follows at once.
    """
    while True:
        delay = chance.choice((0, chance.uniform(0, 0.1)))
        step = saved_step(run_dir) + SAVE_EVERY * chance.choice((1, 2, 3))
        kind = chance.choice(("any", "part", "part", "named"))
        if kind == "any":
            yield after(lambda: True, chance.uniform(0, seconds))
        elif kind == "part":
            yield after(being_written(run_dir, step), delay)
        else:
            yield after(named(run_dir, step), delay / 10)


def after(moment: Moment, seconds: float) -> Moment:
    """Returns the moment that comes so much later."""
    come: list[float] = []

    def has_come() -> bool:
        if not come and moment():
            come.append(time.monotonic())
        return bool(come) and time.monotonic() - come[0] >= seconds

    return has_come


def being_written(run_dir: Path, step: int) -> Moment:
    """Returns when the writing of a checkpoint has begun, not counting what an earlier kill left of it."""
    part = run_dir / f"checkpoints/step-{step:08d}.part"
    before = time_of_change(part)
    return lambda: time_of_change(part) > before or part.with_suffix("").exists()


def named(run_dir: Path, step: int) -> Moment:
    """Returns when a checkpoint has got its name, and older ones are to go."""
    return (run_dir / f"checkpoints/step-{step:08d}").exists


def time_of_change(path: Path) -> int:
    """Returns when something was last put into a folder or taken out of it, in ns; 0 without it."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


@dataclass
class Run:
    """A run in a process group of its own. All its processes hold the other end of `alive`, what they say is `said`."""

    process: BaseProcess
    alive: Connection
    said: Path

    def kill_at(self, moment: Moment) -> bool:
        """Returns whether the run was killed at the moment, which it may have ended before; no process is left then."""
        deadline, was_killed = time.monotonic() + TIMEOUT_SECONDS, False
        while not wait([self.process.sentinel], POLL_SECONDS):
            assert time.monotonic() < deadline, (
                f"neither ended nor killed in {TIMEOUT_SECONDS} s: {self.said.read_text()}"
            )
            if moment():
                self.kill()
                was_killed = True
                break
        self.process.join()
        assert self.alive.poll(TIMEOUT_SECONDS), "a process outlived the kill"
        return was_killed and self.process.exitcode != 0

    def kill(self) -> None:
        """Kills the whole group, if there still is one, and if it is one already."""
        assert self.process.pid
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                kill(self.process.pid, signal.SIGKILL)


@contextmanager
def running(num_processes: int, config: RunConfig) -> Iterator[Run]:
    """Yields a run that has just been started; it ends with the block."""
    context, store, said = with_trainer(), new_store(), config.run_dir.with_suffix(".out")
    ours, theirs = context.Pipe(duplex=False)
    ranks = [rendezvous(store, rank, num_processes) for rank in range(num_processes)]
    process = context.Process(target=lead_group, args=(theirs, ranks, config, said))
    process.start()
    theirs.close()
    run = Run(process, ours, said)
    try:
        yield run
    finally:
        run.kill()
        process.join()


def run_undisturbed(num_processes: int, config: RunConfig) -> float:
    """Returns how many seconds a run took, from its start to its end."""
    started = time.monotonic()
    assert not list(kill_again_and_again(num_processes, config, iter(())))
    return time.monotonic() - started


def lead_group(alive: Connection, ranks: list[dict[str, str]], config: RunConfig, said: Path) -> None:
    """Does what torchrun would: starts the ranks, and fails when one of them does."""
    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    processes = [get_context("fork").Process(target=train_rank, args=(variables, config)) for variables in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def train_rank(variables: dict[str, str], config: RunConfig) -> None:
    """Trains; an error ends the other ranks too, which would wait for this one."""
    os.environ |= variables
    try:
        train(config)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


def check_checkpoints(run_dir: Path) -> int:
    """Returns the step of the last checkpoint, or 0.

    Raises:
        AssertionError: Something that bears the name of a checkpoint, be it the last or not, is not whole.
    """
    for folder in run_dir.glob("checkpoints/step-????????"):
        try:
            verify_integrity_manifest(str(folder))
            assert f"step-{read_info(folder)['step']:08d}" == folder.name
        except Exception as error:
            raise AssertionError(f"{folder.name} is not whole: {' '.join(str(error).split())}") from error
    return saved_step(run_dir)


def saved_step(run_dir: Path) -> int:
    """Returns the step of the last checkpoint, or 0."""
    newest = latest_checkpoint(run_dir)
    return int(newest.name.removeprefix("step-")) if newest else 0


def num_finished_steps(run_dir: Path) -> int:
    """Returns the last step in the metrics, or 0; a kill may have torn a line."""
    if not (file := run_dir / "metrics.jsonl").is_file():
        return 0
    return len([line for line in file.read_text().splitlines() if line.endswith("}")])


def activity_at_kill(run_dir: Path, started_ns: int, said: str) -> str:
    """Returns what a run was doing when it was killed, as what it left shows."""
    parts = [part for part in run_dir.glob("checkpoints/*.part") if time_of_change(part) > started_ns]
    if any(part.name > f"step-{saved_step(run_dir):08d}.part" for part in parts):
        return "in the write of a checkpoint"
    if parts:
        return "in the removal of an old checkpoint"
    return "between checkpoints" if "from step" in said else "before the first step"


def check_same_run(config: RunConfig, whole: RunConfig) -> None:
    """Makes sure that two finished runs have the same steps, weights and checkpoints.

    Raises:
        AssertionError: They have not; the message says what differs.
    """
    for one, other in zip(read_metrics(config.run_dir), read_metrics(whole.run_dir), strict=True):
        for name in ("step", "loss", "grad_norm"):
            assert one[name] == other[name], f"step {other['step']}: {name} was {other[name]}, is {one[name]}"
    names, expected = (sorted(os.listdir(each.run_dir / "checkpoints")) for each in (config, whole))
    assert names == expected, f"checkpoints/ holds {names}, and {expected} where nobody disturbed"
    initialize_distributed()
    ours, theirs = (load_trained_parameters(each.run_dir / "checkpoints" / names[-1]) for each in (config, whole))
    shutdown_distributed()
    assert ours.keys() == theirs.keys()
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"other weights: {differing}"


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"FAILED: {error}")
