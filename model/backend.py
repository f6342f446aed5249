"""The one place that decides which classes the layers are made of.

Linear layers are Transformer Engine's on a GPU, megatron-core's own elsewhere. FP8 exists with Transformer Engine only,
so asking for it without is an error, never a silent bf16.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, te, te_checkpoint, te_parallel_cross_entropy
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from model.config import ComputeConfig
from model.fp8_state import has_fp8_state

BLOCKWISE_SINCE, MXFP8_SINCE = (9, 0), (10, 0)


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether linear layers are Transformer Engine's: where it is installed and there is a GPU, but not in fp32.

    Its matrix products round fp32 to TF32, whatever torch is told.
    """
    return HAVE_TE and torch.cuda.is_available() and dtype != torch.float32


def has_fused_kernels(compute: ComputeConfig, dtype: torch.dtype) -> bool:
    """Whether rotary positions, the gated activation and the loss are Transformer Engine's kernels."""
    return compute.fused_kernels and uses_transformer_engine(dtype)


def layer_provider(dtype: torch.dtype) -> BackendSpecProvider:
    """Returns megatron-core's provider of linear layers for this machine and parameters of a type."""
    return get_backend("transformer_engine" if uses_transformer_engine(dtype) else "local")


def check_machine() -> None:
    """Makes sure that megatron-core can train here at all.

    Raises:
        ValueError: It would use Transformer Engine's kernels, because that is installed, and there is no GPU.
    """
    if HAVE_TE and not torch.cuda.is_available():
        raise ValueError(
            "Transformer Engine is installed, whose optimizer megatron-core then uses, and there is no GPU; use an "
            "environment without the extra `gpu`, or show it the GPU (CUDA_VISIBLE_DEVICES)"
        )


def check_fp8(recipe: str) -> None:
    """Makes sure that this machine can train in FP8 with a recipe.

    Raises:
        ValueError: It cannot; the message says why.
    """
    setting = f"compute.precision=fp8 with compute.fp8_recipe={recipe}"
    if not torch.cuda.is_available():
        raise ValueError(f"{setting} needs a GPU and there is none; use compute.precision=bf16 or fp32")
    if not HAVE_TE:
        raise ValueError(f"{setting} needs Transformer Engine; install the extra `gpu`, or use compute.precision=bf16")
    chip = torch.cuda.get_device_capability()
    needed = {"mxfp8": MXFP8_SINCE, "blockwise": BLOCKWISE_SINCE}.get(recipe, (8, 9))
    if chip < needed:
        name = torch.cuda.get_device_name()
        raise ValueError(
            f"{setting} needs compute capability {needed[0]}.{needed[1]}, and {name} has {chip[0]}.{chip[1]}; use "
            "another compute.fp8_recipe, or compute.precision=bf16"
        )


class _Stateless(Module):
    """Runs a module that is not one of its own, so that checkpoints of a GPU and of a CPU have the same entries."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._hidden = [module]

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the module makes of a tensor."""
        return self._hidden[0](x)


def quick_gelu() -> Module:
    """Returns x * sigmoid(1.702 x) as one kernel of Transformer Engine, where it is used; torch runs three."""
    return _Stateless(te.pytorch.ops.QGELU())


def overwrite_gradients(model: Module) -> list[Tensor]:
    """Lets the first pack of a step overwrite weight gradients, and returns those weights: nobody need clear them.

    Transformer Engine can where it adds weight gradients within the products: in the pass of its first micro-batch it
    adds to nothing, and without rows it writes zeros. A layer that is computed again has forgotten which one is first.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "fuse_wgrad_accumulation", False)]
    if not layers or cast(Any, model).config.recompute_granularity is not None:
        return []
    for layer in layers:
        cast(Any, layer).is_first_microbatch = True  # until its next forward pass
    weights = [cast(Tensor, layer.weight) for layer in layers]
    return [weight for weight in weights if weight.requires_grad]


def no_init(weight: Tensor) -> None:
    """Initialises nothing: every weight is loaded, see `model.weights`."""


class LayerBuilder:
    """Builds the layers of one model: which classes, which configuration, which tensor-parallel group.

    Raises:
        ValueError: The configuration asks for what the classes of this machine cannot do.
    """

    def __init__(self, config: TransformerConfig, tp_group: ProcessGroup) -> None:
        if config.gradient_accumulation_fusion and not uses_transformer_engine(config.params_dtype):
            raise ValueError(
                "compute.gradient_accumulation_fusion=true needs Transformer Engine: a GPU, the extra `gpu`, and "
                "compute.precision=bf16 or fp8; set it to false"
            )
        self.config, self.tp_group = config, tp_group
        self.provider = layer_provider(config.params_dtype)
        # Of layers whose input every rank has whole, with sequence parallelism too
        self.config_for_whole_rows = replace(config, sequence_parallel=False)

    def column_parallel(self, input_size: int, output_size: int, bias: bool, whole_rows: bool = False) -> Module:
        """Returns a linear layer whose output features are divided over the tensor-parallel group.

        With sequence parallelism its input is this rank's rows, or with `whole_rows` all of them.
        """
        return self.provider.column_parallel_linear()(
            input_size,
            output_size,
            config=self.config_for_whole_rows if whole_rows else self.config,
            init_method=no_init,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def row_parallel(self, input_size: int, output_size: int, bias: bool = False) -> Module:
        """Returns a linear layer whose input features are divided over the tensor-parallel group.

        On a process that has them all a bias is added within the product, as column-parallel layers do; behind a sum
        over processes it takes two kernels more.
        """
        if bias and self.tp_group.size() == 1:
            return self.column_parallel(input_size, output_size, bias)
        return self.provider.row_parallel_linear()(
            input_size,
            output_size,
            config=self.config,
            init_method=no_init,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def mlp(self, input_size: int) -> MLP:
        """Returns the language model's FFN: column-parallel, gated activation, row-parallel."""
        linears = self.provider.column_parallel_linear(), self.provider.row_parallel_linear()
        submodules = MLPSubmodules(*linears, activation_func=self._activation)
        size = self.config.ffn_hidden_size
        return MLP(self.config, submodules, input_size=input_size, ffn_hidden_size=size, tp_group=self.tp_group)

    def _activation(self, config: TransformerConfig) -> Module:
        """Returns Transformer Engine's gated activation; `use_te_activation_func` asks for it."""
        build = self.provider.activation_func()
        assert build is not None
        return _Stateless(build(config=config))

    def rms_norm(self) -> Module:
        """Returns an RMSNorm over the hidden features.

        It is torch's everywhere: one kernel on a GPU, and fine with the no visual rows of a pack without images, which
        Transformer Engine's is not known to be; megatron-core's own refuses sequence parallelism.
        """
        norm = torch.nn.RMSNorm(self.config.hidden_size, self.config.layernorm_epsilon, dtype=self.config.params_dtype)
        # Each rank sees a part of the rows, so its gradient is a part of the sum: megatron-core adds those up.
        cast(Any, norm.weight).sequence_parallel = self.config.sequence_parallel
        return norm

    def layer_norm(self) -> Module:
        """Returns a LayerNorm over the hidden features, with torch's epsilon."""
        norm = torch.nn.LayerNorm(self.config.hidden_size, dtype=self.config.params_dtype)
        for parameter in norm.parameters():
            cast(Any, parameter).sequence_parallel = self.config.sequence_parallel
        return norm

    def head_norm(self) -> Module:
        """Returns an RMSNorm over the features of a head, of which each rank has some.

        Megatron-core adds up the gradients of what is called `q_layernorm` or `k_layernorm`, with `qk_layernorm`.
        """
        assert self.config.kv_channels is not None
        return torch.nn.RMSNorm(self.config.kv_channels, self.config.layernorm_epsilon, dtype=self.config.params_dtype)

    def gate(self) -> torch.nn.Parameter:
        """Returns a number that all rows are multiplied by, in its tanh."""
        gate = torch.nn.Parameter(torch.zeros(1, dtype=self.config.params_dtype))
        cast(Any, gate).sequence_parallel = self.config.sequence_parallel
        return gate

    def embedding(self, vocab_size: int) -> VocabParallelEmbedding:
        """Returns the token embedding, divided by vocabulary over the tensor-parallel group.

        It takes ids [1, T] and, with sequence parallelism, gives this rank's rows [T, 1, D].
        """
        return VocabParallelEmbedding(
            vocab_size,
            self.config.hidden_size,
            init_method=no_init,
            reduce_scatter_embeddings=self.config.sequence_parallel,
            config=self.config,
            tp_group=self.tp_group,
        )

    def vocabulary_head(self, vocab_size: int, tied: bool) -> ColumnParallelLinear:
        """Returns the output layer, divided by vocabulary; without a weight of its own if `tied` to the embedding.

        Its input is all rows, since only those with a target pass it.
        """
        return ColumnParallelLinear(
            self.config.hidden_size,
            vocab_size,
            # megatron-core's own class, which leaves the fusion of gradients to apex
            config=replace(self.config_for_whole_rows, gradient_accumulation_fusion=False),
            init_method=no_init,
            bias=False,
            skip_weight_param_allocation=tied,
            tp_group=self.tp_group,
        )

    def cross_entropy(self, logits_RV: Tensor, targets_R: Tensor) -> Tensor:
        """Returns fp32[R], computed in fp32; logits [R, V] hold this rank's part of the vocabulary.

        Transformer Engine's reads the logits in their own type, where megatron-core's keeps a copy of them in fp32.
        """
        if self.config.use_te_activation_func and len(targets_R):  # it refuses no rows at all
            assert te_parallel_cross_entropy is not None
            return te_parallel_cross_entropy(logits_RV[:, None], targets_R[:, None], self.tp_group).squeeze(1)
        return vocab_parallel_cross_entropy(logits_RV.float(), targets_R, tp_group=self.tp_group)

    def fp8_of_all(self) -> AbstractContextManager:
        """Returns the context around all layers; nothing without FP8's delayed recipe, which updates at its end."""
        return get_fp8_context(self.config) if has_fp8_state(self.config) else nullcontext()

    def fp8_of_layer(self, layer: int) -> AbstractContextManager:
        """Returns the context in which a layer (counted over the whole model) runs; nothing without FP8."""
        return nullcontext() if has_fp8_state(self.config) else get_fp8_context(self.config, layer)

    def fp8_at_creation(self, layer: int) -> AbstractContextManager:
        """Returns the context in which a layer is built; nothing unless parameters are kept in FP8."""
        return get_fp8_context(self.config, layer, is_init=True)

    def recomputed[*Args](self, function: Callable[[*Args], Tensor], *args: *Args) -> Tensor:
        """Returns `function(*args)`, computed again in the backward pass instead of keeping what it is made of."""
        if self.config.fp8:  # Transformer Engine's own restores its scales
            return te_checkpoint(function, False, None, self.tp_group, *args)  # no random numbers to restore
        return cast(Tensor, checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False))
