"""Importing this hides GPUs, and Transformer Engine, whose kernels megatron-core would use without one too.

The first import of the tests and of the processes that they start: all but `make test-gpu` compares with the CPU, on
any machine.
"""

import os
import sys

if "SAISA_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.modules["transformer_engine"] = None  # type: ignore
