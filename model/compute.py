"""How a model computes: in which precision, with which attention, what it recomputes, on how many processes.

`build_transformer_config` turns that and the model's sizes into megatron-core's configuration, and nothing else does.
"""

from typing import Literal, Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import Field, model_validator
from torch.nn.functional import silu

from model.backend import BLOCK_ROWS, FP8_ROWS
from model.config import ModelConfig, Section
from model.parallel import ParallelConfig

# Gradients want range where a whole tensor has one scale; blocks have range enough. Transformer Engine's own defaults.
FP8_FORMATS: dict[str, Literal["hybrid", "e4m3"]] = {
    "delayed": "hybrid",
    "tensorwise": "hybrid",
    "blockwise": "e4m3",
    "mxfp8": "e4m3",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class ComputeConfig(Section):
    """Precision, kernels and what memory is spent on."""

    precision: Literal["bf16", "fp32", "fp8"] = Field(
        default="bf16", description="of parameters and activations; fp8: bf16 whose layers multiply in 8 bits"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        default="tensorwise", description="how 8-bit numbers are scaled; mxfp8 needs Blackwell"
    )
    bf16_edge_layers: int = Field(default=0, ge=0, description="first and last layers that stay bf16 under fp8")
    attention: Literal["auto", "dense", "flash_attn", "torch_varlen", "block"] = "auto"
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="selective: projectors and attention; full: layers keep their input only"
    )
    gradient_accumulation_fusion: bool = Field(default=False, description="weight gradients go into their buffer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bf16_edge_layers and self.precision == "fp8" and self.fp8_recipe == "delayed":
            raise ValueError(
                f"compute.bf16_edge_layers={self.bf16_edge_layers} needs layers that are scaled one by one, and "
                "compute.fp8_recipe=delayed updates the scales of all at once; use another recipe, or no edge layers"
            )
        if self.recompute != "none" and self.precision == "fp8" and self.fp8_recipe == "delayed":
            raise ValueError(
                f"compute.recompute={self.recompute} with compute.fp8_recipe=delayed would update the scales at every "
                "layer that is computed again; use another recipe, or compute.recompute=none"
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What parameters and activations are stored in."""
        return DTYPES[self.precision]

    def kernel_rows(self, are_divided: bool) -> int:
        """Returns what a linear layer's rows should be a multiple of; `are_divided`: by sequence parallelism."""
        if self.precision != "fp8":
            return 1
        return BLOCK_ROWS if are_divided and self.fp8_recipe == "blockwise" else FP8_ROWS


def build_transformer_config(
    model: ModelConfig, compute: ComputeConfig, parallel: ParallelConfig, shared_projector: bool
) -> TransformerConfig:
    """Returns megatron-core's configuration of the language model's layers."""
    on_gpu, fp8 = torch.cuda.is_available(), compute.precision == "fp8"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=compute.dtype,
        pipeline_dtype=compute.dtype,
        bf16=compute.dtype == torch.bfloat16,
        fp8=FP8_FORMATS[compute.fp8_recipe] if fp8 else None,
        fp8_recipe=compute.fp8_recipe,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        tp_only_amax_red=True,  # data-parallel ranks have different numbers of micro-batches, so they cannot meet there
        first_last_layers_bf16=fp8 and compute.bf16_edge_layers > 0,
        num_layers_at_start_in_bf16=compute.bf16_edge_layers,
        num_layers_at_end_in_bf16=compute.bf16_edge_layers,
        recompute_granularity=None if compute.recompute == "none" else compute.recompute,
        recompute_method="uniform" if compute.recompute == "full" else None,
        recompute_num_layers=1 if compute.recompute == "full" else None,
        gradient_accumulation_fusion=compute.gradient_accumulation_fusion,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.chunks_per_rank if parallel.chunks_per_rank > 1 else None,
        overlap_p2p_comm=parallel.chunks_per_rank > 1,
        batch_p2p_comm=parallel.chunks_per_rank == 1,  # it confuses the two directions between the same two ranks
        variable_seq_lengths=parallel.pp > 1,  # packs have as many rows as they need
        moe_token_dispatcher_type="alltoall",  # there are no experts, but the default refuses variable lengths
        deallocate_pipeline_outputs=on_gpu,
        calculate_per_token_loss=True,  # losses are summed; the schedule divides by the global number of targets
        perform_initialization=False,  # every weight is loaded, see model.weights
        use_cpu_initialization=not on_gpu,
    )
    # Megatron-core's name for parameters that every stage has a copy of: it sums their gradients over the pipeline.
    config.has_cond_embedder = shared_projector  # pyright: ignore[reportAttributeAccessIssue]
    return config
