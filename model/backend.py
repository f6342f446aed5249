"""The one place that decides which classes the layers are made of.

Transformer Engine's on a GPU, megatron-core's own elsewhere.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.nn.functional import gelu


def leave(weight: Tensor) -> None:
    """Initialises nothing: every weight is loaded, see `model.weights`."""


def layer_provider() -> BackendSpecProvider:
    """Returns megatron-core's provider of linear and norm classes for this machine."""
    return get_backend("transformer_engine" if HAVE_TE and torch.cuda.is_available() else "local")


@dataclass(frozen=True)
class Layers:
    """Builds the layers of one model: which classes, which configuration, which tensor-parallel group."""

    config: TransformerConfig
    tp_group: ProcessGroup

    def column_parallel(self, input_size: int, output_size: int, bias: bool) -> Module:
        """Returns a linear layer whose output features are divided over the tensor-parallel group."""
        return layer_provider().column_parallel_linear()(
            input_size,
            output_size,
            config=self.config,
            init_method=leave,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def row_parallel(self, input_size: int, output_size: int) -> Module:
        """Returns a linear layer without bias whose input features are divided over the tensor-parallel group."""
        return layer_provider().row_parallel_linear()(
            input_size,
            output_size,
            config=self.config,
            init_method=leave,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def gathered_linear(self, input_size: int, output_size: int) -> ColumnParallelLinear:
        """Returns a linear layer with bias that gives every rank all output features.

        Transformer Engine's layers cannot gather, so this is always megatron-core's own.
        """
        return ColumnParallelLinear(
            input_size,
            output_size,
            config=self.config,
            init_method=leave,
            gather_output=True,
            tp_group=self.tp_group,
        )

    def mlp(self, input_size: int, ffn_hidden_size: int) -> MLP:
        """Returns the language model's FFN: column-parallel, gated activation, row-parallel."""
        return self._mlp(self.config, input_size, ffn_hidden_size)

    def gelu_mlp(self, input_size: int, ffn_hidden_size: int) -> MLP:
        """Returns Linear, exact GELU, Linear with biases; the last bias is returned beside the output, not added."""
        config = replace(
            self.config,
            gated_linear_unit=False,
            activation_func=gelu,
            add_bias_linear=True,
            ffn_hidden_size=ffn_hidden_size,
        )
        return self._mlp(config, input_size, ffn_hidden_size)

    def rms_norm(self) -> Module:
        """Returns an RMSNorm over the hidden features."""
        norm = layer_provider().layer_norm(rms_norm=True)
        size, epsilon = self.config.hidden_size, self.config.layernorm_epsilon
        # megatron-core's own norm is a plain torch one, which knows nothing of the model's precision
        return cast(Module, norm(config=self.config, hidden_size=size, eps=epsilon)).to(self.config.params_dtype)

    def embedding(self, vocab_size: int) -> VocabParallelEmbedding:
        """Returns the token embedding, divided by vocabulary over the tensor-parallel group."""
        return VocabParallelEmbedding(
            vocab_size,
            self.config.hidden_size,
            init_method=leave,
            config=self.config,
            tp_group=self.tp_group,
        )

    def vocabulary_head(self, vocab_size: int, tied: bool) -> ColumnParallelLinear:
        """Returns the output layer, divided by vocabulary; without a weight of its own if `tied` to the embedding."""
        return ColumnParallelLinear(
            self.config.hidden_size,
            vocab_size,
            config=self.config,
            init_method=leave,
            bias=False,
            skip_weight_param_allocation=tied,
            tp_group=self.tp_group,
        )

    def _mlp(self, config: TransformerConfig, input_size: int, ffn_hidden_size: int) -> MLP:
        provider = layer_provider()
        submodules = MLPSubmodules(provider.column_parallel_linear(), provider.row_parallel_linear())
        return MLP(config, submodules, input_size=input_size, ffn_hidden_size=ffn_hidden_size, tp_group=self.tp_group)
