"""Importing this, before torch, hides GPUs, and Transformer Engine, which megatron-core would use without one too."""

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["transformer_engine"] = None  # type: ignore
