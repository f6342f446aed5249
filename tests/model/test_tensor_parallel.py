"""Two tensor-parallel processes give the losses and, parameter by parameter, the gradients of one."""

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from model.compute import build_transformer_config
from model.config import ComputeConfig
from model.parallel import ParallelConfig, Stage
from model.saisa import SaisaModel
from model.weights import from_hf, load_parameters, name_table, tensor_parallel_part
from pipeline.distributed import initialize_distributed, shutdown_distributed
from tests.model.test_saisa import random_pack, random_weights, tiny
from tests.processes import run_together

LAYOUTS = [(4,), (1, 4), (0, 3), (2, 3, 3)]  # as many text and visual rows as two processes can share evenly
# fp32 sums in another order. Seen: more than 1e-6 and less than 1e-5 of the largest entry.
TOLERANCE = 1e-5


def losses_and_gradients(changes: dict[str, Any], parallel: ParallelConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """This process's losses and gradients; those of norms under sequence parallelism are its share of a sum."""
    initialize_distributed(parallel)
    groups, model = ProcessGroupCollection.use_mpu_process_groups(), tiny(**changes)
    shared = model.shares_projector("finetune")
    config = build_transformer_config(model, ComputeConfig(precision="fp32"), parallel, shared)
    saisa = SaisaModel(model, config, groups, Stage(0, 1, range(model.num_layers)), shared)
    weights = from_hf(random_weights(model).items(), name_table(model))
    load_parameters(saisa, weights, groups.tp.rank(), groups.tp.size())
    losses = saisa(*random_pack(model, LAYOUTS))
    losses.sum().backward()
    gradients = {}
    for name, parameter in saisa.named_parameters():
        assert parameter.grad is not None
        is_of_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if is_of_heads or (parallel.sequence_parallel and getattr(parameter, "sequence_parallel", False)):
            torch.distributed.all_reduce(parameter.grad, group=groups.tp)  # as megatron-core does after a step
        dim = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        gradients[f"{name} {dim}"] = parameter.grad.numpy()
    shutdown_distributed()
    return losses.detach().numpy(), gradients


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 4},
        {"qkv_bias": True},
        {"projector": "linear"},
        {"projector": "resampler", "resampler_tokens": 2},
        {"tie_embeddings": True},
        {"architecture": "llava"},
        {"architecture": "naavit", "projector": "linear"},
        {"architecture": "shortv", "frozen_layers": (0,)},
        {"block_size": 2},
        {  # of many latents, which are alike, gradients of queries nearly cancel: 4e-5 with 64
            "architecture": "flamingo",
            "cross_attention": "open_flamingo",
            "cross_attention_every": 2,
            "resampler_tokens": 3,
        },
        {"architecture": "flamingo", "cross_attention": "llama_3_2", "cross_attention_every": 2},
    ],
    ids=str,
)
def test_two_processes_have_the_gradients_of_one(changes, sequence_parallel):
    ((losses, whole),) = run_together(1, losses_and_gradients, changes, ParallelConfig())
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    for rank, (found_losses, parts) in enumerate(run_together(2, losses_and_gradients, changes, parallel)):
        np.testing.assert_allclose(found_losses, losses, rtol=TOLERANCE)
        expected = {key.split()[0]: torch.from_numpy(gradient) for key, gradient in whole.items()}
        for key, found in parts.items():
            name, dim = key.split()
            divided = int(dim) if int(dim) >= 0 else None
            part = tensor_parallel_part(name, expected[name], torch.Size(found.shape), divided, rank, 2)
            assert part.shape == found.shape, name
            assert np.abs(part.numpy() - found).max() <= TOLERANCE * expected[name].abs().max().item(), name
