"""Every fact about a model family, once. Config reading, weight mappings, shapes and writers all ask here.

To add a family whose layer is Llama's but for these facts, add a line to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """In what a model family departs from Llama's layer, and what transformers takes for fields that are not there.

    Attributes:
        architecture: HF's class of the causal language model.
        qk_norm: RMSNorm on each query and key head.
        qkv_bias: biases on q, k and v (and on no other matrix).
        moe: experts instead of one MLP.
        head_dim: where config.json names none; None: hidden_size / num_attention_heads.
        rope_theta: likewise; None: it has to be there.
        all_heads_have_keys: num_key_value_heads may be missing and is then num_attention_heads.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    moe: bool = False
    head_dim: int | None = None
    rope_theta: float | None = None
    all_heads_have_keys: bool = False


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, moe=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family("LlamaForCausalLM", rope_theta=10_000.0, all_heads_have_keys=True),
}


def moe_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether it has experts, by HF's rule over `mlp_only_layers` and `decoder_sparse_step`."""
    layers = range(config["num_hidden_layers"])
    if not FAMILIES[config["model_type"]].moe:
        return (False,) * len(layers)
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(i not in dense and (i + 1) % step == 0 for i in layers)
