"""Training for real, small: what each stage changes, resume, refusals, and data parallelism."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.console import run
from common.files import locked
from model.weights import SHARED, read_safetensors
from pipeline import loop as training
from pipeline import step as step_module
from pipeline.checkpoint import writer as checkpoint_writer
from pipeline.checkpoint.checkpoint import choose_checkpoint, load_trained_parameters
from pipeline.checkpoint.run_info import find_checkpoint, latest_checkpoint
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from pipeline.state import build
from pipeline.train import main
from tests.processes import wait_for_steps
from tests.world import CONFIGS


def losses(run_dir) -> list[float]:
    return [step["loss"] for step in read_metrics(run_dir)]


def test_stage_1_stores_what_it_trains_and_nothing_else(world, stage1):
    stored = load_trained(stage1)
    assert stored.keys() == {f"{SHARED}fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert losses(stage1.run_dir)[-1] < losses(stage1.run_dir)[0]


def test_stage_2_starts_from_copies_of_the_shared_projector(stage1, stage2):
    shared = load_trained(stage1)
    state = build(stage2.model_copy(update={"run_dir": stage2.run_dir / "again"}), initialize_distributed())
    parameters = dict(state.stages[0].named_parameters())
    for i in range(stage2.model.num_layers):
        for name, tensor in shared.items():
            assert torch.equal(parameters[f"layers.{i}.projector.{name.removeprefix(SHARED)}"], tensor)
    shutdown_distributed()


def test_stage_2_trains_everything_but_the_encoder(world, stage2):
    base = dict(read_safetensors(stage2.init.base, lambda name: True))
    stored = load_trained(stage2)
    assert not torch.equal(stored["embedding.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(stored["layers.0.projector.fc1.weight"], stored["layers.1.projector.fc1.weight"])
    assert not any("vision" in name for name in stored)


def test_a_killed_run_continues_with_bit_identical_losses(stage2, tmp_path, monkeypatch, capsys):
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    real_step = training.train_step

    def dies_in_step_5(state, batch, *rest):
        if batch.step == 4:
            raise KeyboardInterrupt
        return real_step(state, batch, *rest)

    monkeypatch.setattr(training, "train_step", dies_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    shutdown_distributed()
    (config.run_dir / "checkpoints/step-00000006.part").mkdir()  # what a kill in the middle of a save leaves
    monkeypatch.setattr(training, "train_step", real_step)
    capsys.readouterr()
    train(config)
    assert "from step 4; run folder" in capsys.readouterr().out, "to start anew gives the same losses too"
    assert losses(config.run_dir) == losses(stage2.run_dir)
    assert [step["step"] for step in read_metrics(config.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_does_nothing(stage2):
    before = (stage2.run_dir / "metrics.jsonl").read_text()
    train(stage2)
    assert (stage2.run_dir / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_run_is_refused(stage2):
    other = stage2.model_copy(update={"train": stage2.train.model_copy(update={"seed": 8})})
    with pytest.raises(ValueError, match="belongs to another run: seed was 7, is 8. Use the same settings"):
        train(other)
    shutdown_distributed()


def test_projectors_of_another_base_are_refused(world, stage1, stage2, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(stage2.init.base, other)
    (other / "model.safetensors.index.json").open("a").write(" ")
    moved = stage2.model_copy(update={"init": stage2.init.model_copy(update={"base": other}), "run_dir": tmp_path})
    with pytest.raises(ValueError, match="was trained on another base"):
        train(moved)
    shutdown_distributed()


def test_a_damaged_checkpoint_is_named(stage2, tmp_path):
    shutil.copytree(stage2.run_dir, tmp_path / "run")
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    checkpoint = find_checkpoint(config.run_dir)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        ValueError,
        match="06: damaged .*checkpoint.resume=newest_whole looks for a whole one before it, from step-00000004 on",
    ):
        train(config)
    shutdown_distributed()
    settings = config.checkpoint.model_copy(update={"resume": "newest_whole"})
    train(config.model_copy(update={"checkpoint": settings}))
    assert losses(config.run_dir) == losses(stage2.run_dir)
    names = sorted(folder.name for folder in checkpoint.parent.iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006", "step-00000006.set-aside"]


def test_what_is_said_of_the_checkpoints_before_a_damaged_one_is_true(stage2, tmp_path):
    shutil.copytree(stage2.run_dir, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    initialize_distributed()
    for step, way_out in ((6, f"try {folder}/step-00000004 instead"), (2, "there is none before it")):
        (folder / f"step-{step:08d}/info.json").write_text("{")
        with pytest.raises(ValueError, match=f"damaged .info.json.; {way_out}"):
            load_trained_parameters(folder / f"step-{step:08d}")
    for other in ("step-00000004", "step-00000006"):
        shutil.rmtree(folder / other)
    with pytest.raises(ValueError, match="step-00000002: damaged .*; there is no other; use another run_dir"):
        choose_checkpoint(tmp_path / "run", "auto")
    shutdown_distributed()


@pytest.mark.parametrize("byte", [0.3, 0.6, 0.9])
def test_a_flipped_byte_of_a_checkpoint_is_noticed(stage2, tmp_path, byte):
    shutil.copytree(stage2.run_dir, tmp_path / "run")
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    file = max(find_checkpoint(config.run_dir).glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[int(len(data) * byte)] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(ValueError, match="step-00000006: damaged"):
        train(config)
    shutdown_distributed()


def test_newest_whole_goes_back_as_far_as_there_is_damage_and_no_further(stage2, tmp_path):
    shutil.copytree(stage2.run_dir, tmp_path / "run")
    newest_whole = stage2.checkpoint.model_copy(update={"resume": "newest_whole"})
    config = stage2.model_copy(update={"run_dir": tmp_path / "run", "checkpoint": newest_whole})
    folder, before = config.run_dir / "checkpoints", (stage2.run_dir / "metrics.jsonl").read_text()
    train(config)  # nothing is damaged: the run is finished
    assert (config.run_dir / "metrics.jsonl").read_text() == before
    (folder / "step-00000006/info.json").write_text("{")
    next((folder / "step-00000004").glob("*.distcp")).unlink()
    train(config)
    assert losses(config.run_dir) == losses(stage2.run_dir)
    names = ["step-00000002", "step-00000004", "step-00000004.set-aside", "step-00000006", "step-00000006.set-aside"]
    assert sorted(os.listdir(folder)) == names
    for checkpoint in folder.glob("step-????????"):
        (checkpoint / "integrity.json").unlink()
    with pytest.raises(
        ValueError, match="00002: damaged .integrity.json.; none is left to go on from; use another run_dir"
    ):
        train(config)
    shutdown_distributed()


def test_two_runs_do_not_share_a_folder(stage2, tmp_path):
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    with locked(config.run_dir), pytest.raises(ValueError, match=f"another run is writing to {config.run_dir}; wait"):
        train(config)
    shutdown_distributed()


def test_what_differs_is_named_and_nothing_else(stage2):
    changes = {"optim": stage2.optim.model_copy(update={"weight_decay": 0.5})}
    with pytest.raises(ValueError, match="another run: optim.weight_decay was 0.0, is 0.5. Use the same settings"):
        train(stage2.model_copy(update=changes))
    shutdown_distributed()


def test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on(stage2, tmp_path, monkeypatch):
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    real_forward = step_module.forward_step

    def is_told_to_stop(*args, **settings):
        if len(read_metrics(config.run_dir)) == 2:  # in step 3, which is not one to save after
            os.kill(os.getpid(), signal.SIGTERM)
        return real_forward(*args, **settings)

    monkeypatch.setattr(step_module, "forward_step", is_told_to_stop)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 143
    assert find_checkpoint(config.run_dir).name == "step-00000003"
    monkeypatch.setattr(step_module, "forward_step", real_forward)
    train(config)
    assert losses(config.run_dir) == losses(stage2.run_dir)


def test_a_file_stops_a_run_for_as_long_as_it_is_there(stage2, tmp_path, monkeypatch, capsys):
    config = stage2.model_copy(update={"run_dir": tmp_path / "run"})
    stop, real_step = config.run_dir / "stop", training.train_step

    def is_told_to_stop(state, batch, *rest):
        if batch.step == 2:
            stop.touch()
        return real_step(state, batch, *rest)

    monkeypatch.setattr(training, "train_step", is_told_to_stop)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 143
    assert find_checkpoint(config.run_dir).name == "step-00000003"
    assert f"stopped after step 3, as asked; remove {stop}, then the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(training, "train_step", real_step)
    with pytest.raises(ValueError, match=f"{stop} is there, which stops this run; remove it to go on"):
        train(config)
    shutdown_distributed()
    stop.unlink()
    train(config)
    assert losses(config.run_dir) == losses(stage2.run_dir)


def test_checkpoints_written_in_the_background_are_the_same(stage2, tmp_path, monkeypatch):
    """And training goes on beside them: the first is written once the fourth step has begun, and not before."""
    settings = stage2.checkpoint.model_copy(update={"in_background": True})
    config = stage2.model_copy(update={"run_dir": tmp_path / "run", "checkpoint": settings})
    real_step, real_digests, saved = training.train_step, checkpoint_writer.own_digests, []

    def step(state, batch, *rest):
        saved.append(len([*(config.run_dir / "checkpoints").glob("step-????????")]))
        if batch.step == 3:
            (tmp_path / "go on").touch()
        return real_step(state, batch, *rest)

    def digests(*args):
        deadline = time.monotonic() + 30
        while not (tmp_path / "go on").exists():
            assert time.monotonic() < deadline, "training waits"
            time.sleep(0.01)
        return real_digests(*args)

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(checkpoint_writer, "own_digests", digests)
    train(config)
    assert saved[:4] == [0, 0, 0, 0]
    runs = (config.run_dir, stage2.run_dir)
    names = [sorted(folder.name for folder in (run / "checkpoints").iterdir()) for run in runs]
    assert names[0] == names[1] == ["step-00000002", "step-00000004", "step-00000006"]
    first, second = load_trained(config), load_trained(stage2)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_shards_that_give_no_target_stop_the_run(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, data__template="plain")
    message = r"step 0: no sample has anything to learn \(8 were skipped, .*plain is for captions"
    with pytest.raises(ValueError, match=message):
        train(config)
    shutdown_distributed()


def test_bf16_trains_and_resumes(world, stage1, tmp_path):
    changes = {"compute__precision": "bf16", "train__max_steps": 2, "checkpoint__save_every_steps": 1}
    config = world.config("demo-stage2", tmp_path, init__projector=stage1.run_dir, **changes)
    train(config)
    shutil.rmtree(tmp_path / "checkpoints/step-00000002")
    before = losses(tmp_path)
    train(config)
    assert losses(tmp_path) == before


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_before_the_optimizer_steps(stage2, tmp_path, monkeypatch, what):
    def poisoned(losses, num_planned):
        total = losses.sum() * float("nan")
        return total, torch.tensor(losses.numel(), dtype=torch.int), total.detach() if what == "loss" else losses.sum()

    config = stage2.model_copy(update={"run_dir": tmp_path})
    monkeypatch.setattr(step_module, "sum_losses", poisoned)
    state = build(config, initialize_distributed())
    before = {name: parameter.clone() for name, parameter in state.stages[0].named_parameters()}
    with pytest.raises(ValueError, match=f"step 0: the {what} is nan; stopped before the optimizer step"):
        step_module.train_step(state, state.source[0], 0.0)
    assert all(torch.equal(before[name], parameter) for name, parameter in state.stages[0].named_parameters())
    shutdown_distributed()


def test_moments_in_bf16_are_refused_without_a_gpu(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, optim__moments="bf16")
    with pytest.raises(ValueError, match="optim.moments=bf16 needs a GPU, Transformer Engine"):
        train(config)
    shutdown_distributed()


def test_fp8_is_refused_without_a_gpu(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, compute__precision="fp8")
    with pytest.raises(ValueError, match="compute.precision=fp8 .* needs a GPU and there is none"):
        train(config)
    shutdown_distributed()


@pytest.mark.parametrize("kernel", ["flash_attn", "torch_varlen", "block"])
def test_attention_that_cannot_run_is_refused_before_the_run_has_a_folder(world, tmp_path, kernel):
    config = world.config("demo-stage1", tmp_path / "run", compute__attention=kernel)
    with pytest.raises(ValueError, match=f"compute.attention={kernel} .*, or use compute.attention=auto"):
        train(config)
    assert not config.run_dir.exists()
    shutdown_distributed()


def test_a_base_that_is_not_the_model_of_the_run_is_refused(world, tmp_path):
    config = world.config("demo-stage1", tmp_path, model__ffn_hidden_size=40)
    with pytest.raises(ValueError, match="model.ffn_hidden_size=40 but the folder has 48"):
        train(config)
    shutdown_distributed()


def under_torchrun(recipe: str, overrides: list[str], said: Path) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pipeline.train", "--config", str(CONFIGS / f"{recipe}.yaml"), *overrides]
    with said.open("w") as file:
        return subprocess.Popen(command, cwd=CONFIGS.parent, stdout=file, stderr=file)


def test_two_processes_of_torchrun_give_the_losses_of_one(world, stage1, tmp_path):
    overrides = world.overrides(tmp_path, **{"optim.learning_rate": stage1.optim.learning_rate})
    run = under_torchrun("demo-stage1", overrides, tmp_path / "said")
    assert run.wait() == 0, (tmp_path / "said").read_text()
    # fp32 sums over two ranks in another order; steps of Adam amplify it. Worst seen over 6 steps: 5e-6 relative.
    assert losses(tmp_path) == pytest.approx(losses(stage1.run_dir), rel=5e-5)
    assert read_metrics(tmp_path)[0]["num_targets"] == read_metrics(stage1.run_dir)[0]["num_targets"]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_under_torchrun_stops_as_a_whole_and_goes_on(world, tmp_path, num_workers):
    """As Slurm stops a job: it signals torchrun, which signals the process groups of all ranks, readers included."""
    endless = {"train.max_steps": 9000, "train.num_epochs": 9000, "checkpoint.save_every_steps": 9000}
    command = ("demo-stage1", world.overrides(tmp_path, **endless, **{"data.num_workers": num_workers}))
    stopped = 0
    for said in (tmp_path / "first", tmp_path / "second"):
        run = under_torchrun(*command, said)
        wait_for_steps(run, tmp_path, stopped + 1, said)
        run.terminate()
        assert run.wait() == 1, said.read_text()
        assert f"from step {stopped}; run folder" in said.read_text()
        steps = [step["step"] for step in read_metrics(tmp_path)]
        stopped = len(steps)
        assert steps == [*range(1, stopped + 1)]
        assert find_checkpoint(tmp_path).name == f"step-{stopped:08d}"


@pytest.mark.parametrize(
    ("wrong", "way_out"),
    [(["trian.seed=1"], "did you mean 'train'?"), (["--resume", "previous"], "is called newest_whole now")],
)
def test_the_command_line_ends_with_2_for_a_wrong_setting(wrong, way_out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(CONFIGS / "demo-stage1.yaml"), *wrong])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert way_out in told


@pytest.mark.parametrize(("options", "said"), [([], "auto"), (["--resume", "newest_whole"], "newest_whole")])
def test_resume_is_an_option_too(options, said, monkeypatch, capsys):
    command = ["train", "--config", str(CONFIGS / "demo-stage1.yaml"), *options, "--print-config"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 0 and f"\n  resume: {said}\n" in capsys.readouterr().out


def load_trained(config) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    assert json.loads((checkpoint / "info.json").read_text())["config"]["train"]["seed"] == 7
    initialize_distributed()
    stored = load_trained_parameters(checkpoint)
    shutdown_distributed()
    return stored
