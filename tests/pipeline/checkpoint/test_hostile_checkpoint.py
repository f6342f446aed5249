"""Checkpoints from somebody else: whatever is in them, nothing runs, nothing outside is read, one line says what."""

import hashlib
import io
import json
import os
import pickle
import sys
from enum import Enum
from pathlib import Path
from shutil import copytree
from types import ModuleType

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from common.pickles import read_pickle
from model.fp8_state import fp8_state_checked
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.checkpoint.data_only import data_only, read_metadata
from pipeline.checkpoint.integrity import damaged_files
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.distributed import shutdown_distributed
from pipeline.loop import train


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def sign(folder: Path) -> None:
    """Makes the digests agree with the files."""
    listing = json.loads((folder / "integrity.json").read_text())
    names = [file.name for file in folder.iterdir() if file.name != "integrity.json"]
    listing["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "integrity.json").write_text(json.dumps(listing))


def plant(folder: Path, part: str, marker: Path) -> None:
    """Puts a pickle that runs something into a part of a checkpoint."""
    metadata = read_metadata(folder)
    stream = io.BytesIO()
    torch.save([Executes(marker)], stream)
    if part == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps([Executes(marker), metadata]))
    elif part == "common":
        (folder / "common.pt").write_bytes(stream.getvalue())
    else:  # the object, or a tensor, of which torch would notice the type first
        names = [index for index in metadata.storage_data if not index.fqn.startswith("optimizer.")]
        name = next(index for index in names if index.fqn.startswith("common_state") == (part == "object"))
        info = metadata.storage_data[name]
        file = folder / info.relative_path
        info.offset, info.length = file.stat().st_size, len(stream.getvalue())
        file.write_bytes(file.read_bytes() + stream.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)


@pytest.mark.parametrize("part", ["metadata", "common", "object", "tensor"])
def test_taking_a_projector_runs_nothing(stage1, megatron, tmp_path, part):
    checkpoint = copytree(find_checkpoint(stage1.run_dir), tmp_path / "step-00000006")
    assert load_trained_parameters(checkpoint)
    plant(checkpoint, part, tmp_path / "executed")
    with pytest.raises(ValueError, match=r"step-00000006: damaged \(.*mkdir") as refused:
        load_trained_parameters(checkpoint)
    assert "\n" not in str(refused.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("error", [KeyError("wanted"), CheckpointingException("torn"), NameError("a bug")])
def test_damage_keeps_its_cause_and_a_bug_is_none(stage1, megatron, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(dist_checkpointing, "load", fails)
    with pytest.raises((ValueError, NameError)) as caught:
        load_trained_parameters(find_checkpoint(stage1.run_dir))
    if isinstance(error, NameError):
        assert caught.value is error
    else:
        assert "damaged (" in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("part", ["metadata", "common", "object", "tensor"])
def test_resuming_runs_nothing(stage2, tmp_path, part):
    copytree(stage2.run_dir, tmp_path / "run")
    plant(find_checkpoint(tmp_path / "run"), part, tmp_path / "executed")
    with pytest.raises(ValueError, match=r"step-00000006: damaged \(.*mkdir") as refused:
        train(stage2.model_copy(update={"run_dir": tmp_path / "run"}))
    shutdown_distributed()
    assert "\n" not in str(refused.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../victim", "/etc/passwd", "info.json", "__0_9.distcp"])
def test_tensors_lie_in_the_files_of_the_checkpoint(stage1, megatron, tmp_path, name):
    checkpoint = copytree(find_checkpoint(stage1.run_dir), tmp_path / "step-00000006")
    metadata = read_metadata(checkpoint)
    data = (checkpoint / next(iter(metadata.storage_data.values())).relative_path).read_bytes()
    (tmp_path / "victim").write_bytes(data)
    (checkpoint / "__0_9.distcp").symlink_to(tmp_path / "victim")
    for info in metadata.storage_data.values():
        info.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    with pytest.raises(ValueError, match=r"step-00000006: damaged \((.metadata: it looks for tensors in|__0_9)"):
        load_trained_parameters(checkpoint)


def test_digests_are_of_files_in_the_folder_and_of_all_that_is_read(stage1, megatron, tmp_path):
    checkpoint = copytree(find_checkpoint(stage1.run_dir), tmp_path / "step-00000006")
    assert damaged_files(checkpoint) == []
    torch.save({}, checkpoint / "common.pt")
    assert damaged_files(checkpoint) == ["common.pt"]
    (tmp_path / "victim").write_text("mine")
    listing = json.loads((checkpoint / "integrity.json").read_text())
    listing["files"]["../victim"] = hashlib.sha256(b"mine").hexdigest()
    (checkpoint / "integrity.json").write_text(json.dumps(listing))
    assert damaged_files(checkpoint) == ["../victim", "common.pt"]
    del listing["files"][".metadata"]
    (checkpoint / "integrity.json").write_text(json.dumps(listing))
    assert "integrity.json" in damaged_files(checkpoint)


def test_a_pickle_does_not_change_a_class(stage1, megatron, tmp_path):
    """`BUILD` with a pair sets attributes, also of the class itself, which all later objects would share."""
    checkpoint = copytree(find_checkpoint(stage1.run_dir), tmp_path / "step-00000006")
    named = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (checkpoint / ".metadata").write_bytes(b"\x80\x02" + named + b"N}X\x04\x00\x00\x00evilK\x01s\x86b.")
    sign(checkpoint)
    with pytest.raises(ValueError, match="it changes <class '.*Metadata'>, which is shared"):
        load_trained_parameters(checkpoint)


def test_a_pickle_does_not_change_a_member_of_an_enum():
    class Kind(Enum):
        ONE = 1

    changes = b"\x80\x02ckinds\nKind\nK\x01\x85R}X\x04\x00\x00\x00evilK\x01sb."
    with pytest.raises(ValueError, match="it changes <Kind.ONE: 1>, which is shared"):
        read_pickle(io.BytesIO(changes), {("kinds", "Kind"): Kind})
    assert not hasattr(Kind.ONE, "evil")


def test_loading_forces_torch_to_read_data_and_puts_back_what_was_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Executes(tmp_path / "executed"), tmp_path / "file")
    with data_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and not (tmp_path / "executed").exists()


def as_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@pytest.fixture(
    params=[
        ("transformer_engine.common.recipe", "DelayedScaling"),
        ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    ],
    ids=["Transformer Engine's", "megatron-core's"],
)
def recipe(request, monkeypatch):
    """A recipe as it is pickled; both classes exist on GPUs only. Layers are run with megatron-core's."""
    module, name = ModuleType(request.param[0]), request.param[1]
    kind = type(name, (), {"__module__": module.__name__})
    vars(module)[name] = kind
    for parent in ("transformer_engine", "transformer_engine.common", module.__name__):
        monkeypatch.setitem(sys.modules, parent, module)
    found = kind()
    vars(found).update(margin=0, amax_compute_algo="max")
    return found


def test_scales_of_transformer_engine_are_looked_at_first(recipe, tmp_path):
    scales = {"recipe": recipe, "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    for value in (as_bytes(scales), torch.empty(0, dtype=torch.uint8), None):
        with fp8_state_checked({"layer._extra_state": value}):
            assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
    evil = Executes(tmp_path / "executed")
    torch.save(evil, inner := io.BytesIO())
    nested = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + call(inner.getvalue())  # as tensors are pickled
    for value, message in (
        (as_bytes(scales | {"x": evil}), "layer._extra_state: it names posix.mkdir"),
        (torch.frombuffer(bytearray(nested), dtype=torch.uint8), "mkdir"),
        (torch.ones(3), "not scales of Transformer Engine"),
    ):
        with pytest.raises(ValueError, match=message), fp8_state_checked({"layer._extra_state": value}):
            pass
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ and not (tmp_path / "executed").exists()


def call(argument: bytes) -> bytes:
    """Returns the rest of a pickle that calls what it has named with some bytes."""
    return b"B" + len(argument).to_bytes(4, "little") + argument + b"\x85R."
