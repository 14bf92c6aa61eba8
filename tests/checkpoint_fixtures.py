"""Tiny HF Qwen3 checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

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


def save_tiny_qwen3(
    path: Path,
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    **sizes: int,
) -> Path:
    """A random Qwen3 with every tensor, norms included, different from its neighbours."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(TINY | sizes), tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path
