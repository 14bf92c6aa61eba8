"""Layer specs for Qwen3: Transformer Engine's where it is installed, else plain torch.

Megatron-Core's own torch-only pieces refuse sequence parallelism (its norm), refuse context parallelism and packed
sequences and materialise the scores (its attention), or need Transformer Engine in some versions (its router); the
modules here lift these limits. Both spec families save under the same torch_dist keys.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_bpdg.parallel.sequence import unzigzag


def transformer_engine_available() -> bool:
    """Whether to build on Transformer Engine: it is installed and there is a GPU.

    Raises:
        RuntimeError: it is installed but cannot be imported; falling back in silence would change speed and memory.
    """
    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"transformer-engine is installed but does not load ({error}); repair it, or uninstall it to use the "
            "torch-only layers"
        ) from error
    return True


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32, scaled in the input's dtype as HF's Qwen3 does.

    Its weight is replicated over tensor-parallel ranks; under sequence parallelism each rank sees other positions, so
    the weight is marked for Megatron-Core to sum its gradient over the ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class TorchAttention(nn.Module):
    """Causal grouped-query attention through `scaled_dot_product_attention` (flash kernels on GPU).

    Right padding needs no mask: a causal row never sees what comes after it. Packed sequences attend one by one.

    Under context parallelism each rank holds the queries of two chunks of every sequence (`parallel.sequence.zigzag`).
    It gathers the keys and values of all ranks, and each chunk attends to the part of its sequence that ends with it:
    one all-gather in the forward, one reduce-scatter in the backward, and the scores of no more than one chunk at once.
    """

    def __init__(self, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query [S, B, heads, D], key and value [S, B, groups, D] -> [S, B, heads * D]; packed, all without B."""
        if attention_bias is not None:
            raise ValueError("TorchAttention takes no attention bias")
        size = self.context.size()
        if packed_seq_params is None:
            lengths = [len(query)]
        else:
            query, key, value = query[:, None], key[:, None], value[:, None]
            lengths = (packed_seq_params.cu_seqlens_q_padded.diff() // size).tolist()
        if size == 1:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths))
            out_SBF = torch.cat([self._causal(*part) for part in parts])
        else:
            # One collective for both.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context)
            shards = both.unflatten(0, (size, -1)).split(lengths, dim=1)
            out_SBF = torch.cat([self._on_shard(q, unzigzag(kv)) for q, kv in zip(query.split(lengths), shards)])
        return out_SBF if packed_seq_params is None else out_SBF[:, 0]

    def _on_shard(self, query: Tensor, key_value: Tensor) -> Tensor:
        """This rank's two chunks of queries against the whole sequence's ``[S, B, groups, 2 D]``."""
        front, back = query.chunk(2)
        rank, last = self.context.rank(), 2 * self.context.size() - 1
        return torch.cat(
            [
                self._causal(chunk, *key_value[: (number + 1) * len(chunk)].chunk(2, dim=-1))
                for number, chunk in ((rank, front), (last - rank, back))
            ]
        )

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last ones of the sequence that the keys span. [s, B, heads, D] -> [s, B, heads * D]."""
        out_BHSD = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=causal_lower_right(len(query), len(key)),
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)


class TorchRouter(TopKRouter):
    """Megatron-Core's router with its gate as a plain float32 matmul; 0.16 has one for Transformer Engine only."""

    def gating(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


class TorchExperts(SequentialMLP):
    """This rank's experts, one MLP after the other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, submodules=_mlp(), **kwargs)


def _mlp() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def torch_layer_spec(*, qk_norm: bool = True, experts: bool = False) -> ModuleSpec:
    """One layer from Megatron-Core's parallel linears and the modules above."""
    head_norm = RMSNorm if qk_norm else IdentityOp
    # Transformer Engine fuses norms into the linear after them; save under its keys.
    saved_as = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if experts:
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=TorchExperts, router=TorchRouter))
    else:
        mlp = ModuleSpec(module=MLP, submodules=_mlp())
        saved_as["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=TorchAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=saved_as,
        ),
    )


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's stack of layers."""
    if transformer_engine_available():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    first = get_transformer_layer_offset(config)
    with_experts = [
        config.num_moe_experts is not None and (config.moe_layer_freq == 1 or bool(config.moe_layer_freq[layer]))
        for layer in range(first, first + get_num_layers_to_build(config))
    ]
    layers = [torch_layer_spec(qk_norm=config.qk_layernorm, experts=experts) for experts in with_experts]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
