"""Trajectories -> padded micro-batches with flat per-token tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.parallel.sequence import pad_to_multiple
from megatron_bpdg.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """B right-padded sequences of length S, and their N response tokens in order, flattened.

    N is a multiple of the tensor-parallel size; `real_N` is False on the filler.

    Attributes:
        input_ids_BS, position_ids_BS: int64.
        position_N: flat position ``s * B + b`` of the hidden state that *predicts* each response token.
        sampled_N: the response tokens.
        sequence_N, num_sequences: which sequence of the micro-batch.
        block_N, block_index_S, num_blocks: block numbers unique over the micro-batch, and each block's number within
            its own response.
        real_N: response tokens, not filler.
        mask_N: those of them that the loss counts.
        old_logprobs_N, teacher_*: as in `Trajectory`; None where they have not been asked for.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    position_N: Tensor
    sampled_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    block_N: Tensor
    block_index_S: Tensor
    num_blocks: int
    real_N: Tensor
    mask_N: Tensor
    old_logprobs_N: Tensor | None = None
    teacher_logprobs_N: Tensor | None = None
    teacher_support_NK: Tensor | None = None
    teacher_support_logprobs_NK: Tensor | None = None
    teacher_full_NV: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


_PAYLOAD = {
    "old_logprobs_N": "old_logprobs_R",
    "teacher_logprobs_N": "teacher_logprobs_R",
    "teacher_support_NK": "teacher_support_RK",
    "teacher_support_logprobs_NK": "teacher_support_logprobs_RK",
    "teacher_full_NV": "teacher_full_RV",
}


def collate(
    trajectories: Sequence[Trajectory], *, pad_id: int, length_multiple: int, token_multiple: int
) -> MicroBatch:
    """Pad and flatten; an empty list gives a micro-batch that counts nothing.

    Ranks without trajectories in an optimizer step still have to take part in its collectives.

    Args:
        trajectories: with non-empty responses.
        pad_id: any id of the vocabulary; what it predicts is never read.
        length_multiple: S is a multiple of it (the tensor-parallel size under sequence parallelism).
        token_multiple: N is a multiple of it.
    """
    sequences = [torch.tensor(t.prompt_ids + t.response_ids) for t in trajectories] or [torch.tensor([pad_id, pad_id])]
    length = -(-max(len(s) for s in sequences) // length_multiple) * length_multiple
    batch = len(sequences)
    input_ids_BS = torch.full((batch, length), pad_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids_BS[row, : len(sequence)] = sequence

    lengths = [len(t.response_ids) for t in trajectories]
    positions = [
        (torch.arange(n) + len(t.prompt_ids) - 1) * batch + b for b, (t, n) in enumerate(zip(trajectories, lengths))
    ]
    blocks, block_indices, num_blocks = [], [], 0
    for trajectory in trajectories:
        blocks.append(trajectory.block_R + num_blocks)
        here = int(trajectory.block_R[-1]) + 1
        block_indices.append(torch.arange(here))
        num_blocks += here

    num_tokens = sum(lengths)
    keep_N, real_N = pad_to_multiple(torch.arange(num_tokens), token_multiple)

    def flat(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts)) if num_tokens else torch.zeros(1, dtype=torch.int64)
        return whole[keep_N]

    payload = {}
    for name, source in _PAYLOAD.items():
        # Log-probs may be kept in fewer bits than they are computed with.
        parts = [
            value.float() if value.is_floating_point() else value
            for t in trajectories
            if (value := getattr(t, source)) is not None
        ]
        if parts:
            payload[name] = flat(parts)
    return MicroBatch(
        input_ids_BS=input_ids_BS,
        position_ids_BS=torch.arange(length).expand(batch, -1).contiguous(),
        position_N=flat(positions),
        sampled_N=flat([torch.tensor(t.response_ids) for t in trajectories]),
        sequence_N=flat([torch.full((n,), b) for b, n in enumerate(lengths)]),
        num_sequences=batch,
        block_N=flat(blocks),
        block_index_S=torch.cat(block_indices) if block_indices else torch.zeros(1, dtype=torch.int64),
        num_blocks=max(num_blocks, 1),
        real_N=real_N,
        mask_N=real_N & flat([t.counts for t in trajectories]).bool(),
        **payload,
    )
