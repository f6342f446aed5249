"""Hides what a machine with a GPU may lack: a pytest plugin (`-p tests.gpu.few_packages`), and an import for others.

Such a machine has torch, transformers, numpy, Pillow and pytest with what those need, megatron-core, Transformer Engine
and flash-attn; no network.
"""

import sys

MISSING = (
    "boto3",
    "botocore",
    "matplotlib",
    "moto",
    "pyarrow",
    "ray",
    "sentencepiece",
    "streaming",
    "tensorboard",
    "torchvision",
    "upath",
    "webdataset",
)

for name in MISSING:
    sys.modules[name] = None  # type: ignore
