"""Runs of `train()` against plain torch, in both phases: the same losses, gradient norms and weights.

Independent of what they test are the rows (read from the JSON file and encoded by hand), the features (transformers'
CLIP), the model (`tests.model.reference`, in fp64), the optimizer (torch's AdamW and clipping, on all that is trained:
biases and norms decay too) and the schedule (written out). Only which rows a batch has is taken from
`pipeline.data.order`, and where the projectors start from the code.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from model.weights import SHARED, name_table, random_projectors, to_hf
from pipeline.checkpoint.checkpoint import load_trained_parameters
from pipeline.checkpoint.run_info import find_checkpoint
from pipeline.config import RunConfig
from pipeline.data.batches import open_shards
from pipeline.data.order import Source, order
from pipeline.distributed import initialize_distributed, shutdown_distributed
from pipeline.loop import train
from pipeline.metrics import read_metrics
from tests.model.reference import reference_logits, reference_loss
from tests.world import World

NUM_STEPS, PEAK = 4, 0.02
BETAS, EPSILON, DECAY, CLIP = (0.8, 0.95), 1e-3, 0.3, 0.1
CHANGES = {
    "train__max_steps": NUM_STEPS,
    "optim__learning_rate": PEAK,
    "optim__warmup_fraction": 0.3,  # two steps of four
    "optim__adam_beta1": BETAS[0],
    "optim__adam_beta2": BETAS[1],
    "optim__adam_epsilon": EPSILON,
    "optim__weight_decay": DECAY,
    "optim__clip_grad_norm": CLIP,
}
# Warm-up from 0 over two steps, then half a cosine to 0 over the two that are left.
RATES = [0.0, PEAK / 2, PEAK, PEAK * (1 + math.cos(math.pi / 2)) / 2]
NAMES = {"0.weight": "fc1.weight", "0.bias": "fc1.bias", "2.weight": "fc2.weight", "2.bias": "fc2.bias"}
# The run is in fp32, torch here in fp64. Worst seen: 7e-7 of the largest weight of a tensor, 2e-7 of a loss or norm.
TOLERANCE = 1e-5

type Sample = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


OWN = pytest.param("pretrain", "own", marks=pytest.mark.slow)


@pytest.mark.parametrize(("phase", "first"), [("pretrain", "shared"), OWN, ("finetune", "shared")])
def test_four_steps_are_those_of_torch(deep_world, deep_stage1, phase, first, tmp_path):
    is_first = phase == "pretrain"
    recipe, start = ("demo-stage1", "random") if is_first else ("demo-stage2", deep_stage1.run_dir)
    config = deep_world.config(recipe, tmp_path, init__projector=start, model__pretrain_projectors=first, **CHANGES)
    train(config)

    weights = start_of_run(config, deep_stage1)
    trained = {name: tensor for name, tensor in weights.items() if not is_first or "mm_projector" in name}
    losses, norms = train_with_torch(config, weights, {*trained}, encoded_batches(deep_world, config))

    metrics = read_metrics(tmp_path)
    assert [step["learning_rate"] for step in metrics] == pytest.approx(RATES)
    assert [step["loss"] for step in metrics] == pytest.approx(losses, rel=TOLERANCE)
    assert [step["grad_norm"] for step in metrics] == pytest.approx(norms, rel=TOLERANCE)
    assert min(norms) > 2 * CLIP, "so that all steps are clipped"
    found = weights_of_run(config)
    assert found.keys() == trained.keys()
    for name, tensor in found.items():
        assert (tensor - trained[name]).abs().max() <= TOLERANCE * trained[name].abs().max(), name


def start_of_run(config: RunConfig, stage1: RunConfig) -> dict[str, Tensor]:
    """Returns the weights that a run starts from in fp64, by Hugging Face name; in stage 1 all layers share some."""
    files = sorted(config.init.base.glob("*.safetensors"))
    base = {name: tensor.double() for file in files for name, tensor in load_file(file).items() if "vision" not in name}
    model = config.model
    prefixes = [SHARED] if config.shared_projector else [f"layers.{i}.projector." for i in range(model.num_layers)]
    starts_new = config.phase == "pretrain"
    first = dict(random_projectors(model, prefixes, config.train.seed)) if starts_new else stored(stage1)
    for theirs, ours in NAMES.items():
        for i in range(model.num_layers):
            own = f"layers.{i}.projector.{ours}"
            one = first[own if own in first else SHARED + ours]
            base[f"model.layers.{i}.mm_projector.{theirs}"] = one.double()
        if config.shared_projector:
            one = base[f"model.layers.0.mm_projector.{theirs}"]
            base |= {f"model.layers.{i}.mm_projector.{theirs}": one for i in range(model.num_layers)}
    return base


def stored(config: RunConfig) -> dict[str, Tensor]:
    """Returns what a finished run has trained, by our names."""
    initialize_distributed()
    found = load_trained_parameters(find_checkpoint(config.run_dir))
    shutdown_distributed()
    return found


def weights_of_run(config: RunConfig) -> dict[str, Tensor]:
    """Returns what a finished run has trained, by Hugging Face name."""
    found = stored(config)
    if not config.shared_projector:
        return dict(to_hf(found.items(), name_table(config.model)))
    layers = range(config.model.num_layers)
    return {f"model.layers.{i}.mm_projector.{a}": found[SHARED + b] for i in layers for a, b in NAMES.items()}


def train_with_torch(
    config: RunConfig, weights: dict[str, Tensor], trained: set[str], batches: list[list[Sample]]
) -> tuple[list[float], list[float]]:
    """Trains `weights` in place; returns the loss and the gradient norm of each step."""
    parameters = {id(weights[name]): weights[name].requires_grad_() for name in sorted(trained)}.values()
    adamw = torch.optim.AdamW([*parameters], betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    losses, norms = [], []
    for rate, batch in zip(RATES, batches, strict=True):
        adamw.zero_grad()
        sums = [
            reference_loss(reference_logits(weights, config.model, tokens, positions, features, visual), targets)
            for tokens, positions, targets, features, visual in batch
        ]
        loss = torch.stack(sums).sum() / sum(int((targets >= 0).sum()) for _, _, targets, _, _ in batch)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*parameters], CLIP)))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        losses.append(loss.item())
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses, norms


def encoded_batches(world: World, config: RunConfig) -> list[list[Sample]]:
    """Returns the samples of each global batch, encoded from the rows of the JSON file alone."""
    (shards,) = open_shards(config)
    numbers = order(config.train.seed, 0, [Source(tuple(shards.shard_sizes))], config.data.shards_in_use)
    size = config.train.global_batch_size
    rows = {str(row["id"]): row for row in json.loads((world.root / "data/mixed.json").read_text())}
    batches = [
        [rows[shards.record(n)["id"]] for n in part]
        for part in np.split(numbers, range(size, NUM_STEPS * size + 1, size))
    ]
    tower = CLIPVisionModel.from_pretrained(world.root / "clip")
    processor = CLIPImageProcessor.from_pretrained(world.root / "clip")
    tokenizer = AutoTokenizer.from_pretrained(world.root / "llm")
    assert config.model.vision.select_layer == -2

    def features(row: dict) -> Tensor:
        paths = row.get("image", [])
        images = [
            Image.open(world.root / "data/images" / path) for path in ([paths] if isinstance(paths, str) else paths)
        ]
        if not images:
            return torch.zeros(0, config.model.vision.hidden_size, dtype=torch.double)
        with torch.no_grad():
            states = tower(processor(images, return_tensors="pt").pixel_values, output_hidden_states=True).hidden_states
        return states[-2][:, 1:].flatten(0, 1).double()

    v = config.model.num_tokens_per_image
    return [[encode(row, tokenizer, features(row), v) for row in batch] for batch in batches[:NUM_STEPS]]


def encode(row: dict, tokenizer, features: Tensor, v: int) -> Sample:
    """Returns tokens, positions, targets, features and visual positions of a row, written as template v1 has it."""
    text = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    for human, gpt in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
        question = human["value"]
        if question.count("<image>") == 1:
            question = "<image>\n" + question.replace("<image>", "").strip()
        text += f"USER: {question} ASSISTANT: {gpt['value']}</s>"
    tokens, positions, learned, visual, place = [tokenizer.bos_token_id], [0], [False], [], 1
    for number, piece in enumerate(text.split("<image>")):
        if number:
            visual += range(place, place + v)
            place += v
        answers = [match.span(1) for match in re.finditer("ASSISTANT:( .*?</s>)", piece)]
        found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            tokens.append(token)
            positions.append(place)
            learned.append(any(first <= start and end <= last for first, last in answers))
            place += 1
    targets = [after if learns else -100 for after, learns in zip(tokens[1:], learned[1:], strict=True)] + [-100]
    return (
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(targets),
        features,
        torch.tensor(visual, dtype=torch.long),
    )
