"""Qwen3 models, dense and with experts, and their relatives on Megatron-Core's GPTModel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.models.shape import ModelShape, check_layout, padded_vocab_size
from megatron_bpdg.models.specs import block_spec, transformer_engine_available
from megatron_bpdg.parallel.platform import cpu_platform_enabled, default_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> TransformerConfig:
    """Megatron-Core's description of the model, for training with a per-token loss.

    Args:
        gradient_accumulation_fusion: for a model that is trained: linear layers and the head add the gradients of
            their weights to the main gradients themselves.

    Raises:
        ValueError: where the layout does not divide the model.
    """
    check_layout(shape, layout)
    on_cpu = default_device().type == "cpu"
    if on_cpu and not cpu_platform_enabled():
        raise RuntimeError("no CUDA device: call megatron_bpdg.parallel.platform.enable_cpu_platform() first")
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        softmax_scale=_softmax_scale(shape),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        # Transformer Engine's ring; it takes padded and packed sequences. The torch-only attention has one way.
        cp_comm_type="p2p" if layout.context_parallel > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=layout.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",  # the only one that variable_seq_lengths accepts, dense models included
        batch_p2p_comm=not on_cpu,
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        # Weights are always read from a checkpoint or from seeded full tensors, never from per-rank generators.
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        # The embedding's backward then adds in a fixed order, and Transformer Engine is held to it too.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        **_expert_fields(shape, layout),
    )


def _softmax_scale(shape: ModelShape) -> float | None:
    # YaRN multiplies queries and keys alike, the whole head: the same as a factor on their product.
    attention = 1.0 if shape.rope_scaling is None else shape.rope_scaling.attention
    return attention**2 / math.sqrt(shape.head_dim)


def _expert_fields(shape: ModelShape, layout: Layout) -> dict[str, Any]:
    """Softmax over all experts, the top k, no capacity limit and no load-balancing or z-loss: HF's forward pass.

    Megatron-Core takes the softmax after the choice by default, which renormalises the chosen weights to 1. Logits and
    weights of the router are float32 whatever the model's dtype, where HF rounds them.
    """
    experts = shape.experts
    if experts is None:
        return {}
    layers = [int(i not in experts.dense_layers) for i in range(shape.num_hidden_layers)]
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.moe_intermediate_size,
        "moe_router_topk": experts.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": transformer_engine_available(),
        # Megatron-Core stacks the layers of a checkpoint only where this is an integer.
        "moe_layer_freq": 1 if all(layers) else layers,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
    }


class HiddenStateGPTModel(GPTModel):
    """GPTModel that stops before the language-model head.

    On the last pipeline stage `forward` returns the normed hidden states ``[S (or S/TP), B, H]``; the loss projects
    only the positions it needs. Megatron-Core 0.18 has `output_processor` for this; 0.16 and 0.17 do not, and all of
    them call `_postprocess` with the hidden states first.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's vocabulary rows of the output head, ``[V_padded / TP, H]``."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> HiddenStateGPTModel:
    """This rank's stage of the model, uninitialised weights, on the default device; see `transformer_config`."""
    config = transformer_config(
        shape, layout, dtype, recompute=recompute, gradient_accumulation_fusion=gradient_accumulation_fusion
    )
    model = HiddenStateGPTModel(
        config=config,
        transformer_layer_spec=block_spec(config),
        vocab_size=padded_vocab_size(shape.vocab_size, layout.tensor_parallel),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    if shape.rope_scaling is not None:
        model.rotary_pos_emb.inv_freq = shape.rope_scaling.frequencies(shape.head_dim, shape.rope_theta)
    _mark_tensor_parallel(model)
    _mark_experts(model)
    return model.to(default_device())


def _mark_tensor_parallel(model: nn.Module) -> None:
    """Mark sharded weights as such, which Megatron-Core does only where it initialises them itself.

    An unmarked weight counts as a duplicate on all ranks but the first, and the gradient norm comes out too small.
    """
    partition_dim = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in partition_dim and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim[type(module)], stride=1)


def _mark_experts(model: nn.Module) -> None:
    """Sum the experts' gradients over the ranks that hold the same ones.

    Megatron-Core does so only under expert parallelism; without, it sums over data-parallel ranks, which leaves out
    the tensor-parallel ranks that hold the same expert and route other tokens to it (expert_tensor_parallel < TP).
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
