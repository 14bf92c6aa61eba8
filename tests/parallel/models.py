"""Tiny HF Qwen3 checkpoints and seeded trajectories for the tests on real Megatron-Core."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_bpdg.drift import FixedBlocks
from megatron_bpdg.rollout.trajectory import Trajectory

VOCAB = 18


def write_checkpoint(folder: Path, *, tied: bool, seed: int, layers: int = 4, vocab: int = VOCAB) -> Path:
    """A random Qwen3 with non-trivial norms, 4 heads in 4 groups (so that it splits over 4 ranks), in float32."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
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
