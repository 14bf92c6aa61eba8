"""Tiny HF checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Attention width (8 * 12 = 96) differs from the hidden size; 98 rows need padding at TP 4 but not at TP 1 and 2.
TINY: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 64,
}


TINY_MOE: dict[str, Any] = TINY | {
    "num_hidden_layers": 2,
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def save_tiny(
    path: Path,
    model_type: str = "qwen3",
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    **fields: Any,
) -> Path:
    """A random model with every tensor, norms and biases included, different from its neighbours.

    Args:
        path: new HF directory.
        model_type: key of `MODELS`.
        tied: share embedding and head.
        dtype: of the stored weights.
        seed: of the weights.
        max_shard_size: bytes per file.
        fields: of the config, over `TINY` or `TINY_MOE`.
    """
    config, model_class = MODELS[model_type]
    sizes = dict(TINY_MOE if model_type == "qwen3_moe" else TINY)
    if model_type in ("qwen2", "llama"):  # the head size is hidden_size / heads
        del sizes["head_dim"]
    torch.manual_seed(seed)
    model = model_class(config(**(sizes | fields), tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tiny_qwen3(path: Path, *, tied: bool, **options: Any) -> Path:
    """`save_tiny` of a dense Qwen3."""
    return save_tiny(path, "qwen3", tied=tied, **options)


def save_tiny_moe(path: Path, *, tied: bool, **options: Any) -> Path:
    """`save_tiny` of a Qwen3-MoE."""
    return save_tiny(path, "qwen3_moe", tied=tied, **options)


def compare_hf(a: Path, b: Path) -> list[str]:
    """Every tensor that two HF checkpoints do not share bit for bit, read by safetensors itself; files do not count."""
    left, right = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (a, b)
    )
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left
        or name not in right
        or (left[name].dtype, left[name].shape) != (right[name].dtype, right[name].shape)
        or not torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
    )
