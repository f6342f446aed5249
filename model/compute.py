"""How a model computes: in which precision, with which attention, what it recomputes, on how many processes.

`build_transformer_config` turns that and the model's sizes into megatron-core's configuration, and nothing else does.
"""

from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from model.backend import has_fused_kernels
from model.config import ComputeConfig, ModelConfig
from model.parallel import ParallelConfig

# Gradients want range where a whole tensor has one scale; blocks have range enough. Transformer Engine's own defaults.
FP8_FORMATS: dict[str, Literal["hybrid", "e4m3"]] = {
    "delayed": "hybrid",
    "tensorwise": "hybrid",
    "blockwise": "e4m3",
    "mxfp8": "e4m3",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def compute_dtype(compute: ComputeConfig) -> torch.dtype:
    """Returns what parameters and activations are stored in."""
    return DTYPES[compute.precision]


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
        qk_layernorm=model.cross_attention == "llama_3_2",  # of its blocks
        bias_activation_fusion=False,
        use_te_activation_func=has_fused_kernels(compute, compute_dtype(compute)),
        apply_rope_fusion=has_fused_kernels(compute, compute_dtype(compute)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=compute_dtype(compute),
        pipeline_dtype=compute_dtype(compute),
        bf16=compute_dtype(compute) == torch.bfloat16,
        fp8=FP8_FORMATS[compute.fp8_recipe] if fp8 else None,
        fp8_recipe=compute.fp8_recipe,
        fp8_param=compute.fp8_weights,
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
        batch_p2p_sync=False,  # for a bug of old versions of torch
        variable_seq_lengths=parallel.pp > 1,  # packs have as many rows as they need
        moe_token_dispatcher_type="alltoall",  # there are no experts, but the default refuses variable lengths
        deallocate_pipeline_outputs=on_gpu,
        calculate_per_token_loss=True,  # neither schedule nor DDP divides: losses come divided by the global targets
        perform_initialization=False,  # every weight is loaded, see model.weights
        use_cpu_initialization=not on_gpu,
    )
    # Megatron-core's name for parameters that every stage has a copy of: it sums their gradients over the pipeline.
    config.has_cond_embedder = shared_projector  # pyright: ignore[reportAttributeAccessIssue]
    return config
