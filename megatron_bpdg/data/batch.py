"""Trajectories -> padded or packed micro-batches with flat per-token tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.parallel.sequence import pad_to_multiple, zigzag

Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences ``[B, S]``, or packed ones ``[1, S]`` in a row, and their N response tokens, flattened.

    Under context parallelism these are this rank's shard of every sequence (`zigzag`), and the response tokens that
    are predicted here. Block and sequence numbers are those of the whole micro-batch, so sums over them are completed
    over the context-parallel ranks as they are over any others that share the tokens. N is a multiple of the
    tensor-parallel size; `real_N` is False on the filler.

    Attributes:
        input_ids_BS, position_ids_BS: int64; positions count from 0 in each sequence.
        cu_seqlens: packed only: where each sequence begins and where the last one ends, int32 ``[num_sequences + 1]``,
            padding and the shards of all context-parallel ranks included.
        max_seqlen: packed only: the longest of these sequences.
        position_N: flat position ``s * B + b`` of the hidden state that *predicts* each response token.
        sampled_N: the response tokens.
        sequence_N, num_sequences: which sequence of the micro-batch.
        block_N, block_index_G, num_blocks: block numbers unique over the micro-batch, and each block's number within
            its own response.
        token_N, num_tokens: each token's number among the response tokens of the whole micro-batch.
        real_N: response tokens, not filler.
        mask_N: those of them that the loss counts.
        num_counted: tokens that the loss counts in the whole micro-batch.
        old_logprobs_N, weights_N, mass_N, teacher_*: as in `Trajectory`; None where they have not been asked for.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    position_N: Tensor
    sampled_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    block_N: Tensor
    block_index_G: Tensor
    num_blocks: int
    token_N: Tensor
    num_tokens: int
    real_N: Tensor
    mask_N: Tensor
    num_counted: int
    old_logprobs_N: Tensor | None = None
    weights_N: Tensor | None = None
    mass_N: Tensor | None = None
    teacher_logprobs_N: Tensor | None = None
    teacher_support_NK: Tensor | None = None
    teacher_support_logprobs_NK: Tensor | None = None
    teacher_full_NV: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


# The place of a token that another context-parallel rank predicts.
_ELSEWHERE = -1

# What is said about tokens: a field of the batch is that of `Trajectory` with N for R.
_PAYLOAD = [field.name for field in fields(MicroBatch) if field.default is None]


def collate(
    trajectories: Sequence[Trajectory],
    *,
    pad_id: int,
    length_multiple: int,
    token_multiple: int,
    packed: bool = False,
    context_rank: int = 0,
    context_size: int = 1,
) -> MicroBatch:
    """Pad or pack, cut and flatten; an empty list gives a micro-batch that counts nothing.

    Ranks without trajectories in an optimizer step still have to take part in its collectives. Which token follows
    which is settled on the whole sequence, before it is cut.

    Args:
        trajectories: with non-empty responses.
        pad_id: any id of the vocabulary; what it predicts is never read.
        length_multiple: S is a multiple of it (the tensor-parallel size under sequence parallelism).
        token_multiple: N is a multiple of it.
        packed: lay the sequences one after the other instead of padding them to the longest.
        context_rank, context_size: which shard of every sequence, out of how many.
    """
    sequences = [torch.tensor(t.prompt_ids + t.response_ids) for t in trajectories] or [torch.tensor([pad_id, pad_id])]
    padded = _padded_lengths([len(s) for s in sequences], length_multiple, packed, context_size)
    held = [zigzag(length, context_rank, context_size) for length in padded]
    ids = [F.pad(s, (0, n - len(s)), value=pad_id)[here] for s, n, here in zip(sequences, padded, held)]
    join = (lambda rows: torch.cat(rows)[None]) if packed else torch.stack
    input_ids_BS, position_ids_BS = join(ids), join(held)

    lengths = [len(t.response_ids) for t in trajectories]
    num_tokens = sum(lengths)
    blocks = [int(t.block_R[-1]) + 1 for t in trajectories]
    *first_block, num_blocks = accumulate(blocks, initial=0)
    places = _places(trajectories, padded, held, packed)
    place_M = torch.cat(places) if num_tokens else torch.full((1,), _ELSEWHERE)
    token_N, real_N = pad_to_multiple((place_M != _ELSEWHERE).nonzero()[:, 0], token_multiple)

    def flat(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts)) if num_tokens else torch.zeros(1, dtype=torch.int64)
        return whole[token_N]

    payload = {}
    for name in _PAYLOAD:
        # Log-probs may be kept in fewer bits than they are computed with.
        parts = [
            value.float() if value.is_floating_point() and name != "mass_N" else value
            for t in trajectories
            if (value := getattr(t, name.replace("_N", "_R"))) is not None
        ]
        if parts:
            payload[name] = flat(parts)
    return MicroBatch(
        input_ids_BS=input_ids_BS,
        position_ids_BS=position_ids_BS,
        cu_seqlens=torch.tensor([0, *accumulate(padded)], dtype=torch.int32) if packed else None,
        max_seqlen=max(padded),
        # A rank that predicts no token at all has filler only: any hidden state will do.
        position_N=place_M[token_N].clamp(min=0),
        sampled_N=flat([torch.tensor(t.response_ids) for t in trajectories]),
        sequence_N=flat([torch.full((n,), b) for b, n in enumerate(lengths)]),
        num_sequences=len(sequences),
        block_N=flat([t.block_R + first for t, first in zip(trajectories, first_block)]),
        block_index_G=torch.cat([torch.arange(n) for n in blocks or [1]]),
        num_blocks=max(num_blocks, 1),
        token_N=token_N,
        num_tokens=num_tokens,
        real_N=real_N,
        mask_N=real_N & flat([t.counts for t in trajectories]).bool(),
        num_counted=sum(int(t.counts.sum()) for t in trajectories),
        **payload,
    )


def _places(
    trajectories: Sequence[Trajectory], padded: Sequence[int], held: Sequence[Tensor], packed: bool
) -> list[Tensor]:
    """Of each response, the flat positions of the hidden states that predict its tokens."""
    places, start = [], 0
    for b, (trajectory, length, here) in enumerate(zip(trajectories, padded, held)):
        local = torch.arange(len(here))
        # From a position in the whole sequence to where this rank's hidden state of it lies: Megatron's are
        # [S, B, H], so flattened they count sequence position first; a packed row is its sequences end to end.
        place = torch.full((length,), _ELSEWHERE)
        place[here] = start + local if packed else local * len(trajectories) + b
        start += len(here)
        # Position p predicts the token at p + 1: the last prompt token the first of the response. The shift is made
        # here, on the whole sequence, as the two may lie on different context-parallel ranks.
        first = len(trajectory.prompt_ids) - 1
        places.append(place[first : first + len(trajectory.response_ids)])
    return places


def _padded_lengths(lengths: Sequence[int], length_multiple: int, packed: bool, context_size: int) -> list[int]:
    """What each sequence is padded to: the chunks of `zigzag` are equal, and a rank's S has its multiple."""
    chunks = 2 * context_size if context_size > 1 else 1
    multiple = math.lcm(chunks, context_size * length_multiple)
    if not packed:
        return [max(lengths) + -max(lengths) % multiple] * len(lengths)
    padded = [length + -length % chunks for length in lengths]
    padded[-1] += -sum(padded) % multiple  # one filler at the end of the row serves all
    return padded


def up_to(items: Iterable[Item], sizes: Iterable[int], limit: int) -> Iterator[list[Item]]:
    """Consecutive items whose sizes come to at most `limit` together; a larger one by itself."""
    held: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if held and total + size > limit:
            yield held
            held, total = [], 0
        held.append(item)
        total += size
    if held:
        yield held


def by_tokens(trajectories: Sequence[Trajectory], budget: int) -> list[list[Trajectory]]:
    """Micro-batches of at most `budget` prompt and response tokens, a longer sequence by itself.

    The longest sequence goes first, each into the first micro-batch with room for it: few micro-batches, and the same
    ones on every rank that holds the same sequences.
    """
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in trajectories]
    chunks: list[list[Trajectory]] = []
    room: list[int] = []
    for i in sorted(range(len(trajectories)), key=lambda i: -lengths[i]):
        into = next((n for n, free in enumerate(room) if lengths[i] <= free), len(chunks))
        if into == len(chunks):
            chunks.append([])
            room.append(budget)
        chunks[into].append(trajectories[i])
        room[into] -= lengths[i]
    return chunks
