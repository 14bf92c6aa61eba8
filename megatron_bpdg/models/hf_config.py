"""HF config.json files of small Qwen3 models, to start from fresh weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bpdg.tracking.files import write_text


def write_qwen3_config(
    path: Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab_size: int,
    tied: bool,
    max_positions: int = 4096,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Write a Qwen3 `config.json` to `path` for `student.init`; readable by transformers' AutoConfig.

    Raises:
        ValueError: a size below 1, `head_dim` odd (rotary embeddings pair dimensions), or `kv_heads` not a divisor of
            `heads`.
    """
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": ffn,
        "vocab_size": vocab_size,
        "max_positions": max_positions,
    }
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"sizes must be at least 1, got {bad}")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} must be even")
    if heads % kv_heads:
        raise ValueError(f"kv_heads = {kv_heads} must divide heads = {heads}")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(config, indent=2) + "\n")
