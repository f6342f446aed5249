"""What a GPU test cannot do without; a test that lacks it is skipped and says so."""

import pytest
from megatron.core.extensions.transformer_engine import HAVE_TE

from model.backend import check_fp8


def need_transformer_engine() -> None:
    if not HAVE_TE:
        pytest.skip("needs Transformer Engine: install the extra `gpu`")


def need_recipe(recipe: str) -> None:
    need_transformer_engine()
    try:
        check_fp8(recipe)
    except ValueError as error:
        pytest.skip(str(error))
