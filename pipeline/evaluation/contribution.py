"""What each layer of a LLaVA contributes by updating visual tokens: how far the next token moves when it does not.

Layer Contribution of layer i is the Kullback-Leibler divergence between the model's distribution of the next token, at
the last position of a prompt, and that of the same model with visual tokens frozen in layer i alone: they leave it as
they came, and text attends to them as before. Nothing reads what the last layer leaves, so its contribution is 0.

Source: ShortV (arXiv 2504.00502), section 3.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import count_text
from data_prep.image_roots import ImageEntry
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.updates_saisa import build_layer
from model.hf_export import load_export
from pipeline.data.templates import chat_templates
from pipeline.evaluation.answers import batch_inputs, progress_of, prompt_of
from pipeline.evaluation.questions import Question
from pipeline.evaluation.ranking import Direction


@contextmanager
def frozen(model: SaisaForConditionalGeneration, layers: Collection[int]) -> Iterator[None]:
    """Makes a `llava` model the `shortv` with these frozen layers while the block runs, on the same weights."""
    config, layers_of_model = deepcopy(model.config), model.model.layers
    config.architecture, config.frozen_layers = "shortv", sorted(layers)
    kept = {number: layers_of_model[number] for number in layers}
    try:
        for number, layer in kept.items():
            with torch.device("meta"):
                other = build_layer(config, number)
            other.load_state_dict(layer.state_dict(), assign=True)
            layers_of_model[number] = other.train(layer.training)
        yield
    finally:
        for number, layer in kept.items():
            layers_of_model[number] = layer


def next_token_log_probabilities(model: SaisaForConditionalGeneration, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns f64[B, V], of the token after each prompt."""
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].double().log_softmax(dim=-1)


def divergence(original_BV: Tensor, frozen_BV: Tensor, direction: Direction) -> Tensor:
    """Returns KL(frozen || original), or KL(original || frozen), f64[B] in nats, of log-probabilities."""
    one_BV, other_BV = (frozen_BV, original_BV) if direction == "frozen-original" else (original_BV, frozen_BV)
    return (one_BV.exp() * (one_BV - other_BV)).sum(dim=-1)


@torch.inference_mode()
def layer_contributions(
    model: SaisaForConditionalGeneration, inputs: Mapping[str, Tensor], direction: Direction
) -> Tensor:
    """Returns f64[B, L], the contribution of each layer for each prompt of a batch that ends at the last position."""
    original_BV, columns = next_token_log_probabilities(model, inputs), []
    for number in range(model.config.num_hidden_layers):
        with frozen(model, [number]):
            columns.append(divergence(original_BV, next_token_log_probabilities(model, inputs), direction))
    return torch.stack(columns, dim=1)


def measure_contributions(
    model_dir: Path,
    questions: Sequence[Question],
    images: Mapping[tuple[int, str], ImageEntry],
    num_samples: int,
    direction: Direction,
    batch_size: int,
) -> tuple[list[list[float]], int]:
    """Returns the contributions by sample and layer, and how many questions were too long for the model's positions.

    Args:
        model_dir: Export of a `llava`.
        questions: The first that fit are the samples.
        images: Of the questions.
        num_samples: Questions to measure.
        direction: Of the divergence.
        batch_size: Prompts read at once.

    Raises:
        ValueError: The folder cannot be read, an image cannot, or too few questions fit.
    """
    processor, model = load_export(model_dir, chat_templates())
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    limit, chosen, num_too_long = model.config.max_position_embeddings, [], 0
    for question in questions:
        if len(chosen) == num_samples:
            break
        if len(processor.tokenize(prompt_of(question, processor))) <= limit:
            chosen.append(question)
        else:
            num_too_long += 1
    if len(chosen) < num_samples:
        fit, positions = count_text(len(chosen), "question"), count_text(limit, "position")
        raise ValueError(
            f"{model_dir}: {fit} of {len(questions):,} fit its {positions}, and --samples {num_samples} wants more; "
            "give more rows, or fewer --samples"
        )
    contributions = []
    for batch in progress_of([chosen[i : i + batch_size] for i in range(0, num_samples, batch_size)], "measuring"):
        inputs: Any = batch_inputs(batch, images, processor).to(model.device)
        contributions += layer_contributions(model, inputs, direction).tolist()
    return contributions, num_too_long
