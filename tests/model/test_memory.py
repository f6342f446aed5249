"""The recipes fit the GPUs they are for. `tests/benchmarks/test_fake_gpu.py` compares the formulas with traces."""

from pathlib import Path

import pytest

from model.memory import largest_pack, peak_bytes
from pipeline.config import load_config

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("saisa-*-stage*.yaml"))
USABLE_BYTES = 84.9e9  # what torch gets of an H100 with 80 GB (79.1 GiB of 80)
GPUS = 8  # the fewest the recipes are for: with more, a GPU holds less of the optimizer


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_largest_pack_of_a_recipe_leaves_a_tenth_of_the_memory_free(recipe):
    config = load_config(recipe, [])
    pack = largest_pack(config.model, config.data.max_text_tokens_per_pack, config.data.max_images_per_pack)
    peak = peak_bytes(config.model, config.phase, config.compute, pack, config.optim.moments, GPUS)
    assert peak <= 0.9 * USABLE_BYTES


def test_there_are_six_recipes():
    assert len(RECIPES) == 6
