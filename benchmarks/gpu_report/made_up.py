"""Made-up weights and batches, the same on every machine, so that losses can be compared between them."""

from dataclasses import replace
from zlib import crc32

import torch

from benchmarks.fake_gpu.step import build_batch, build_pack
from benchmarks.fake_gpu.traces import Load
from pipeline.data.batches import GlobalBatch
from pipeline.state import TrainState


def make_up_weights(state: TrainState, on_cpu: bool) -> None:
    """Fills the model and the encoder; from the CPU's random numbers they are the same on every machine."""
    device = torch.device("cpu") if on_cpu else state.device
    with torch.no_grad():
        for name, parameter in (item for part in [*state.stages, state.tower] for item in part.named_parameters()):
            generator = torch.Generator(device).manual_seed(crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
    state.optimizer.reload_model_params()


def random_batch(step: int, state: TrainState, load: Load) -> GlobalBatch:
    """Returns one pack of random tokens and images, the same on every machine."""
    generator = torch.Generator().manual_seed(step)
    pack = build_pack(load, state.config.model.num_tokens_per_image, state.config.row_multiple)
    tokens, targets = torch.randint(state.config.model.vocab_size, (2, len(pack.token_ids_T)), generator=generator)
    targets = torch.where(pack.targets_T < 0, pack.targets_T, targets)
    batch = build_batch(step, [replace(pack, token_ids_T=tokens, targets_T=targets)], state)
    batch.micro_batches[0].pixels_B3HW.random_(0, 256, generator=generator)
    return replace(batch, counts=replace(batch.counts, num_targets=pack.num_targets))
