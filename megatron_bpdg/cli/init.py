"""`bpdg init`: a small model with fresh weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from megatron_bpdg.cli.common import console, quiet_libraries


def init(
    target: Annotated[Path, typer.Argument(help="New HF directory.")],
    tokenizer: Annotated[Path, typer.Option(help="HF tokenizer directory; copied along.")],
    layers: Annotated[int, typer.Option(min=1)] = 2,
    hidden: Annotated[int, typer.Option(min=1)] = 64,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: Annotated[int, typer.Option(min=2)] = 16,
    ffn: Annotated[int, typer.Option(min=1)] = 128,
    vocab_size: Annotated[int, typer.Option(min=1, help="Rows of the embedding.")] = 151_936,
    tied: Annotated[bool, typer.Option(help="Share embedding and output head.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small Qwen3 with fresh seeded weights, for trying things out."""
    quiet_libraries()

    import torch
    from transformers import Qwen3Config

    from megatron_bpdg.checkpoint.hf import write_fresh_checkpoint
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.models.shape import ModelShape

    if target.exists():
        raise ValueError(f"{target} exists; choose a new directory")
    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ).save_pretrained(folder)
        ModelShape.from_hf(read_hf_config(folder))
        write_fresh_checkpoint(Path(folder), tokenizer, target, seed=seed, dtype=torch.float32)
    console.print(f"written: {target}")
