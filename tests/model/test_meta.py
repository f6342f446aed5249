"""A 7B model is built without its memory, whole and in parts, and has the parameters that are counted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.compute import build_transformer_config
from model.config import ComputeConfig, ModelConfig
from model.flops import Phase, parameter_counts
from model.parallel import ParallelConfig, stages_of_rank
from model.saisa import SaisaModel
from pipeline.optimizer import freeze

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
TP, PP = 8, 4


@pytest.fixture(params=[0, TP - 1], ids=["first", "last"])
def tp_group(request: pytest.FixtureRequest) -> Iterator[torch.distributed.ProcessGroup]:
    """A tensor-parallel group of eight that this process is alone in: it can be asked, but nothing can be sent."""
    torch.distributed.init_process_group("fake", rank=request.param, world_size=TP, store=FakeStore())
    group = torch.distributed.group.WORLD
    assert group is not None
    yield group
    torch.distributed.destroy_process_group()


class Alone:
    """A group of one process that is asked for nothing else."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def model_config(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))


def stages(name: str, phase: Phase, parallel: ParallelConfig, tp_group: object) -> list[SaisaModel]:
    """Returns every stage of the pipeline, on the device that has no memory."""
    model, shared = model_config(name), phase == "pretrain"
    config = build_transformer_config(model, ComputeConfig(), parallel, shared)
    groups = ProcessGroupCollection(tp=tp_group)
    layers = [model.num_layers // parallel.pp] * parallel.pp
    with torch.device("meta"):
        built = [
            SaisaModel(model, config, groups, part, shared)
            for rank in range(parallel.pp)
            for part in stages_of_rank(layers, rank, parallel.pp)
        ]
    for part in built:
        freeze(part, phase)
        assert {tensor.device.type for tensor in [*part.parameters(), *part.buffers()]} == {"meta"}
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    return built


def numel(part: SaisaModel, prefix: str = "") -> int:
    return sum(parameter.numel() for name, parameter in part.named_parameters() if name.startswith(prefix))


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["saisa-vicuna-7b", "saisa-mistral-7b", "saisa-llama3-8b"])
def test_a_whole_model_has_the_parameters_that_are_counted(name, phase):
    (whole,) = stages(name, phase, ParallelConfig(), Alone())
    expected = parameter_counts(model_config(name), phase)
    assert numel(whole) == expected.total
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) == expected.num_trained


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_eight_parts_of_four_stages_are_the_model(phase, tp_group):
    """Every rank of the eight has the same shapes: an eighth of what is divided, and all of norms and last biases."""
    parallel = ParallelConfig(tp=TP, pp=PP, sequence_parallel=True)
    model = model_config("saisa-vicuna-7b")
    expected = parameter_counts(model, phase)
    parts = stages("saisa-vicuna-7b", phase, parallel, tp_group)
    assert [numel(part, "embedding") for part in parts] == [expected.embedding // TP, 0, 0, 0]
    assert [numel(part, "output") for part in parts] == [0, 0, 0, expected.head // TP]
    assert [numel(part, "final_norm") for part in parts] == [0, 0, 0, model.hidden_size]

    norms = 2 * model.hidden_size * model.num_layers
    assert (
        sum(numel(part, "layers") - layer_projectors(part) for part in parts) == (expected.layers - norms) // TP + norms
    )
    if phase == "pretrain":
        projector = (expected.projectors - model.hidden_size) // TP + model.hidden_size
        assert [numel(part, "shared_projector") for part in parts] == [projector] * PP
    else:
        biases = model.hidden_size * model.num_layers
        assert sum(map(layer_projectors, parts)) == (expected.projectors - biases) // TP + biases
    assert [sorted(int(name) for name in part.layers)[0] for part in parts] == [0, 8, 16, 24]


def layer_projectors(part: SaisaModel) -> int:
    return sum(parameter.numel() for name, parameter in part.named_parameters() if ".projector." in name)
