"""Tiny HF checkpoints and seeded trajectories for the tests on real Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.partition import FixedBlocks

VOCAB = 18


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}


def write_checkpoint(
    folder: Path, *, tied: bool, seed: int, layers: int = 4, vocab: int = VOCAB, kind: str = "qwen3", **changes: Any
) -> Path:
    """A random model with non-trivial norms and biases, 8 heads in 4 groups (so that it splits over 4 ranks), float32.

    Args:
        kind: model_type; "qwen3_moe" has 8 experts, 3 for each token.
        changes: other config fields.
    """
    sizes = SIZES | (EXPERTS if kind == "qwen3_moe" else {}) | changes
    if kind == "qwen2":  # the head size is hidden_size / heads
        del sizes["head_dim"]
    config = AutoConfig.for_model(
        kind, vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=tied, use_cache=False, **sizes
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # A router as narrow as the rest would give all experts nearly the same weight.
        std = 1.0 if name.endswith("mlp.gate.weight") else 0.2
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    model.save_pretrained(folder)
    return folder


def trajectories(count: int = 7, vocab: int = VOCAB) -> list[Trajectory]:
    """Seeded random responses of uneven length, in blocks of 4, with a behaviour policy that is some way off."""
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(vocab, (2 + index % 3,), generator=generator).tolist()
        response = torch.randint(vocab, (3 + (5 * index) % 11,), generator=generator).tolist()
        made.append(
            Trajectory(
                problem=index,
                sample=0,
                prompt_ids=prompt,
                response_ids=response,
                sampler_logprobs_R=-2.0 - torch.rand(len(response), generator=generator),
                finished=True,
                block_R=FixedBlocks(4)(torch.tensor(response)),
            )
        )
    return made


def edge_cases(vocab: int = VOCAB) -> list[Trajectory]:
    """Responses that sharding and masking could get wrong, in blocks of 4.

    Two tokens in all, fewer than a context-parallel group has chunks; a prompt of half the sequence, which ends at a
    chunk's border wherever the sequence is not padded; masks with holes, with a block of nothing, with one token.
    """
    masks = [[True], [True] * 8, [False, True, True] + [False] * 5 + [True, False, True] + [True] * 2]
    masks.append([False] * 6 + [True] + [False] * 2)
    made = []
    for index, (prompt_tokens, mask) in enumerate(zip((1, 8, 3, 5), masks), start=100):
        generator = torch.Generator().manual_seed(index)
        response = torch.randint(vocab, (len(mask),), generator=generator).tolist()
        made.append(
            Trajectory(
                problem=index,
                sample=0,
                prompt_ids=torch.randint(vocab, (prompt_tokens,), generator=generator).tolist(),
                response_ids=response,
                sampler_logprobs_R=-2.0 - torch.rand(len(response), generator=generator),
                finished=True,
                mask_R=torch.tensor(mask),
                block_R=FixedBlocks(4)(torch.tensor(response)),
            )
        )
    return made
