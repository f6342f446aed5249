"""Fixtures of the tests that need a GPU: one that was asked for and cannot run has failed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("needs a CUDA GPU that torch can see; look at CUDA_VISIBLE_DEVICES")
    torch.compiler.reset()  # each test has other head counts, more than are compiled for one function
    return torch.device("cuda")
