"""Seeded fresh weights as an HF checkpoint, so that every layout starts from the same tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def write_fresh_checkpoint(config: Path, tokenizer: Path, target: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write HF's own initialisation of a model under a seed, with its tokenizer.

    Args:
        config: HF config.json, or a directory with one.
        tokenizer: HF tokenizer directory.
        target: new HF directory.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config, local_files_only=True), dtype=dtype)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(target)
