"""Inputs of the parity checks: every placement of ids on shards that has broken a vocab-parallel loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bpdg.drift.partition import FixedBlocks
from megatron_bpdg.objectives.vocabulary import DenseVocab

JUNK = 1e4
"""What padding columns hold: large enough to own any softmax that it gets into."""


@dataclass(frozen=True)
class Case:
    """One input: N rows in two sequences, K support ids.

    Attributes:
        vocab: true vocabulary size.
        divisor: each shard's width is a multiple of it, which makes padding, and shards of padding alone.
        support: how ids are chosen: anywhere, all on the last shard, on every shard, the first and last id of every
            shard, or with repeats.
        impossible: ids whose logit is -inf for the student and the teacher alike, or for the student alone.
        nan_row: this row's logits hold a NaN on one shard.
        masked: rows that do not count.
    """

    vocab: int = 16
    rows: int = 8
    k: int = 4
    divisor: int = 1
    support: str = "anywhere"
    impossible_both: tuple[int, ...] = ()
    impossible_student: tuple[int, ...] = ()
    nan_row: int | None = None
    masked: tuple[int, ...] = ()
    temperature: float = 1.0
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def width(self, shards: int) -> int:
        return -(-self.vocab // (shards * self.divisor)) * self.divisor


CASES: dict[str, Case] = {
    "anywhere": Case(temperature=0.7),
    "one_shard": Case(support="last_shard"),
    "every_shard": Case(support="every_shard"),
    "edges": Case(support="edges"),
    "repeats": Case(support="repeats"),
    "padded": Case(vocab=11, k=3, seed=1),
    "shard_of_padding": Case(vocab=3, divisor=4, k=2, seed=2),
    "some_masked": Case(masked=(0, 3, 6), seed=3),
    "all_masked": Case(masked=tuple(range(8))),
    "impossible_ids": Case(impossible_both=(1, 9, 15), seed=4),
    "impossible_for_student": Case(impossible_student=(2, 12), seed=5),
    "nan_row": Case(nan_row=2, seed=6),
    "nan_row_masked": Case(nan_row=2, masked=(2,), seed=6),
    "no_rows": Case(rows=0),
    "complete_support": Case(vocab=5, k=5, temperature=1.3),
    "all_but_one": Case(vocab=5, k=4),
    "float32": Case(dtype=torch.float32, vocab=11, k=3),
    "bfloat16": Case(dtype=torch.bfloat16, vocab=11, k=3),
}


@dataclass(frozen=True)
class Inputs:
    """A case's tensors, whole, the same on every rank and for every number of ranks. V excludes padding."""

    student_NV: Tensor
    teacher_NV: Tensor
    sampled_N: Tensor
    support_NK: Tensor
    old_logprobs_N: Tensor
    mask_N: Tensor
    weight_N: Tensor
    coefficient_NV: Tensor
    sequence_N: Tensor
    block_N: Tensor


def build_inputs(case: Case, shards: int) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    n, v = case.rows, case.vocab

    def normal(*shape: int) -> Tensor:
        return 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_NV, teacher_NV = (normal(n, v).to(case.dtype) for _ in range(2))
    student_NV[:, list(case.impossible_both + case.impossible_student)] = -math.inf
    teacher_NV[:, list(case.impossible_both)] = -math.inf
    if case.nan_row is not None:
        student_NV[case.nan_row, 0] = math.nan

    width = case.width(shards)
    edges = [e for s in range(shards) for e in (s * width, min((s + 1) * width, v) - 1) if s * width < v]
    allowed = [i for i in range(v) if i not in case.impossible_both + case.impossible_student]
    shuffled_NV = torch.rand(n, v, generator=generator).argsort(-1)
    if case.support == "edges":
        support_NK = torch.tensor(sorted(set(edges))).expand(n, -1)
    elif case.support == "last_shard":
        support_NK = v - 4 + (torch.arange(n)[:, None] + torch.arange(3)) % 4
    elif case.support == "every_shard":
        support_NK = torch.stack([shuffled_NV[:, s] % width + s * width for s in range(shards)], dim=1)
    elif case.support == "repeats":
        support_NK = shuffled_NV[:, [0, 1, 0, 2, 1]]
    else:
        support_NK = shuffled_NV[:, : case.k]
    pool = sorted(set(edges)) if case.support == "edges" else allowed
    sampled_N = torch.tensor([pool[(3 * i + 1) % len(pool)] for i in range(n)], dtype=torch.int64)

    mask_N = torch.ones(n, dtype=torch.bool)
    mask_N[list(case.masked)] = False
    sequence_N = (torch.arange(n) >= 5).long()
    block_N = torch.cat([FixedBlocks(3)(torch.zeros(min(n, 5))), FixedBlocks(3)(torch.zeros(max(n - 5, 0))) + 2])
    # The behaviour policy is an earlier student: near enough for both sides of the clip to occur.
    earlier = DenseVocab(student_NV.double().nan_to_num(0.0) + 0.2 * normal(n, v), v, case.temperature)
    return Inputs(
        student_NV=student_NV,
        teacher_NV=teacher_NV,
        sampled_N=sampled_N,
        support_NK=support_NK,
        old_logprobs_N=earlier.logprob(sampled_N).nan_to_num(neginf=-9.0),
        mask_N=mask_N,
        weight_N=normal(n),
        coefficient_NV=normal(n, v),
        sequence_N=sequence_N,
        block_N=block_N,
    )
