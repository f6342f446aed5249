"""Tiny exported models, prompts with images for them, and what the equations say."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionModel

from model.config import ModelConfig, model_config_from_hf
from model.hf.configuration_saisa import SaisaConfig
from model.hf.modeling_saisa import SaisaForConditionalGeneration
from model.hf.vision_saisa import stored_name
from tests.hf_compat.tiny import SIZES, VISION, VOCAB, randomise
from tests.model.flamingo_reference import flamingo_logits
from tests.model.reference import reference_logits
from tests.transformers_versions import encoder_inside

IMAGE = VOCAB  # the id that stands for one visual token: in an export, the row after those of the language model
V = 4  # visual tokens of an image
I = [IMAGE] * V  # noqa: E741
# Text only, one image, an image first, images that touch, interleaved images, unequal lengths.
ROWS = [[1, 5, 9, 9, 3], [1, *I, 7, 8], [*I, 7, 6, 5, 4, 3], [1, 8, *I, *I, 2, 2], [1, 4, *I, 4, 5, *I, 6, *I, 7, 8, 9]]
NUM_IMAGES = [0, 1, 1, 2, 3]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def build(vision: str = "clip", seed_of_weights: int = 0, **changes: Any) -> SaisaForConditionalGeneration:
    encoder = VISION | {"model_type": f"{vision}_vision_model"}
    sizes = SIZES | {"vocab_size": VOCAB + 1, "image_token_id": IMAGE, "vision_config": encoder}
    config = SaisaConfig(**sizes | changes)
    model = SaisaForConditionalGeneration(config)
    randomise(model, seed_of_weights)
    return model


def pixels(num_images: int, seed: int = 3) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, 28, 28, generator=generator) if num_images else None


def batch(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [p + row if side == "left" else row + p for p, row in zip(pads, rows, strict=True)]
    ones = [p + [1] * len(r) if side == "left" else [1] * len(r) + p for p, r in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ones)}


def all_pixels() -> Tensor:
    images = pixels(sum(NUM_IMAGES))
    assert images is not None
    return images


def own_pixels(row: int) -> Tensor | None:
    return all_pixels().split(NUM_IMAGES)[row] if NUM_IMAGES[row] else None


def reference(
    model: SaisaForConditionalGeneration,
    row: list[int],
    images: Tensor | None,
    trace: dict[str, list[Tensor]] | None = None,
    rules: list[tuple[str, str]] | None = None,
) -> Tensor:
    """Returns logits [text tokens, VOCAB] from the equations, with features from transformers' own encoder.

    `trace` gets what `reference_logits` writes down; `rules` are those of an architecture other than SAISA.
    """
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    tower = "model.vision_tower."
    kind = CLIPVisionModel if config.vision_config.model_type == "clip_vision_model" else SiglipVisionModel
    encoder = kind(config.vision_config).eval()
    stored = {stored_name(name): tensor for name, tensor in model.state_dict().items()}
    prefix = tower + "vision_model."
    encoder_inside(encoder).load_state_dict(
        {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    )
    features = torch.zeros(0, VISION["hidden_size"], dtype=torch.float64)
    if images is not None:
        with torch.no_grad():
            hidden = encoder(images, output_hidden_states=True).hidden_states[config.vision_select_layer]
        features = (hidden[:, 1:] if kind is CLIPVisionModel else hidden).flatten(0, 1).double()
    ids = torch.tensor(row)
    if config.architecture == "flamingo":
        return flamingo_reference(weights, model_config_from_hf(config), ids, features, trace)
    text, visual = (ids != IMAGE).nonzero()[:, 0], (ids == IMAGE).nonzero()[:, 0]
    sizes = model_config_from_hf(config)
    return reference_logits(weights, sizes, ids[text], text, features, visual, trace, rules)[:, :VOCAB]


def flamingo_reference(
    weights: dict[str, Tensor],
    sizes: ModelConfig,
    ids: Tensor,
    features: Tensor,
    trace: dict[str, list[Tensor]] | None = None,
) -> Tensor:
    """The same of cross-attention; attention weights are zero at placeholders."""
    text = ids != IMAGE
    before = ((~text).cumsum(0)[text] // V).tolist()
    trace = {} if trace is None else trace
    logits = flamingo_logits(weights, sizes, ids[text], list(features.split(4)), before, trace)
    own = trace["weights"]
    trace["weights"] = [own[0].new_zeros(*each.shape[:2], len(ids)) for each in own]
    for wide, narrow in zip(trace["weights"], own, strict=True):
        wide[..., text] = narrow
    return logits[:, :VOCAB]
