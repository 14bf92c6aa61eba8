"""Logits of HF transformers and of Megatron-Core on the same text, from checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.live import load_weights
from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.qwen3 import build_model
from megatron_bpdg.models.shape import ModelShape
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.world import world

# float32 sums in another order differ by this much of the largest value over a few dozen layers.
TOLERANCE = 1e-4


@torch.no_grad()
def verify_logits(hf: Path, megatron: Path, text: str) -> str:
    """Run both models on `text` in float32, one after the other; returns in words how close they are.

    Args:
        hf: HF directory with a tokenizer.
        megatron: torch_dist checkpoint with an hf folder.
        text: at least one token.

    Raises:
        MappingError: the models disagree by more than rounding.
        FileNotFoundError, ValueError: a checkpoint that cannot be loaded, or a text without tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    ids_T = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    if not len(ids_T):
        raise ValueError(f"the probe text {text!r} has no tokens")
    ours_TV = _megatron_logits(megatron, ids_T)
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    theirs_TV = theirs(ids_T[None]).logits[0].float()
    largest, difference = float(theirs_TV.abs().max()), float((ours_TV - theirs_TV).abs().max())
    words = (
        f"largest difference {difference:.3g} of logits up to {largest:.3g} over {len(ids_T)} tokens; same first "
        f"choice at {int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())}"
    )
    # Written so that NaN is no agreement.
    if not difference <= TOLERANCE * max(1.0, largest):
        raise MappingError(f"HF transformers and Megatron-Core disagree: {words}")
    return f"logits agree: {words}"


def _megatron_logits(megatron: Path, ids_T: Tensor) -> Tensor:
    config = read_hf_config(hf_folder(megatron))
    with world(Layout(), seed=0):
        model = build_model(ModelShape.from_hf(config), Layout(), torch.float32).eval()
        load_weights([model], megatron)
        ids_BT = ids_T[None].to(default_device())
        positions_BT = torch.arange(len(ids_T), device=ids_BT.device)[None]
        hidden_SBH = model(ids_BT, positions_BT, None)
        return (hidden_SBH[:, 0] @ model.head_weight().T)[:, : config["vocab_size"]].cpu()
