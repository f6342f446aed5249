"""Importing this hides GPUs, and Transformer Engine, whose kernels megatron-core would use without one too.

The first import of the tests and of the processes that they start: all but `make test-gpu` compares with the CPU, on
any machine. There nothing is compiled, unless a test deletes `TORCHDYNAMO_DISABLE`; megatron-core would import the
compiler, for a second in each process.
"""

import os
import sys

if "SAISA_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.modules["transformer_engine"] = None  # type: ignore
