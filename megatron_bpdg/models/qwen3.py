"""Qwen3 dense models on Megatron-Core's GPTModel, described by HF's config.json."""

from __future__ import annotations

from dataclasses import dataclass
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

from megatron_bpdg.config.schema import Layout
from megatron_bpdg.models.specs import block_spec
from megatron_bpdg.parallel.platform import cpu_platform_enabled, default_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Qwen3Shape:
    """Sizes of a Qwen3 dense model, in HF's terms.

    `head_dim` is a field of its own: hidden_size / num_attention_heads is wrong for 0.6B, 4B and 32B.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    head_dim: int = 128
    vocab_size: int = 151_936
    max_position_embeddings: int = 40_960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3Shape:
        """Read HF's config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
            ValueError: naming the field that is missing.
        """
        fields = dict(config)
        if "rope_theta" not in fields:
            fields["rope_theta"] = (fields.get("rope_parameters") or {}).get("rope_theta")
        required = [name for name in cls.__dataclass_fields__ if name != "max_position_embeddings"]
        if missing := [name for name in required if fields.get(name) is None]:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if fields.get(name) is not None})

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, the tied embedding counted once, padding not."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * 2 * (heads + groups) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


# Published dense models (HF config.json of each release).
SIZES = {
    "0.6B": Qwen3Shape(28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "1.7B": Qwen3Shape(28, 2048, 6144, 16, 8, tie_word_embeddings=True),
    "4B": Qwen3Shape(36, 2560, 9728, 32, 8, tie_word_embeddings=True),
    "8B": Qwen3Shape(36, 4096, 12_288, 32, 8, tie_word_embeddings=False),
    "14B": Qwen3Shape(40, 5120, 17_408, 40, 8, tie_word_embeddings=False),
    "32B": Qwen3Shape(64, 5120, 25_600, 64, 8, tie_word_embeddings=False),
}


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of the tensor-parallel size.

    Qwen3's 151,936 rows need no padding at any power of two up to 128. Padded rows never enter a softmax.
    """
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def check_layout(shape: Qwen3Shape, layout: Layout) -> None:
    """Raise ValueError naming every size that the layout does not divide."""
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    divisible = {
        "num_attention_heads": (shape.num_attention_heads, tp, "tensor_parallel"),
        "num_key_value_heads": (shape.num_key_value_heads, tp, "tensor_parallel"),
        "intermediate_size": (shape.intermediate_size, tp, "tensor_parallel"),
        "num_hidden_layers": (shape.num_hidden_layers, pp, "pipeline_parallel"),
    }
    problems = [
        f"layout.{knob}: {size} does not divide {name} = {value}"
        for name, (value, size, knob) in divisible.items()
        if value % size
    ]
    if problems:
        raise ValueError("; ".join(problems) + "; choose a divisor")


def transformer_config(
    shape: Qwen3Shape, layout: Layout, dtype: torch.dtype, *, recompute: bool = False
) -> TransformerConfig:
    """Megatron-Core's description of the model, for training with a per-token loss.

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
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
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
        gradient_accumulation_fusion=False,
    )


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
    shape: Qwen3Shape, layout: Layout, dtype: torch.dtype, *, recompute: bool = False
) -> HiddenStateGPTModel:
    """This rank's stage of the model, uninitialised weights, on the default device."""
    config = transformer_config(shape, layout, dtype, recompute=recompute)
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
    _mark_tensor_parallel(model)
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
