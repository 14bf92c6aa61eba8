"""Factors: a weight and a mass per token.

    L = sum m W l / sum m M        W, M: the products of all factors' weights and masses, m: the mask

Weights multiply, masses multiply, and both are summed over the whole optimizer step; gradients are divided by the total
mass once. So the loss does not depend on how tokens are dealt to ranks and micro-batches, whatever the factors are.

Live factors are asked in every forward pass and see the current student. Prepared ones are asked once per rollout
batch, before anything is sharded, and see whole responses; what they say travels with the responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_bpdg.drift.signals import Factor, Signals, SumReduce


def unit_mean(g_n: Tensor) -> Factor:
    """Reweigh: the mean weight is one over what counts (BPDG)."""
    return Factor(g_n, g_n.double())


def plain(r_n: Tensor) -> Factor:
    """Importance weights: the token count stays the denominator."""
    return Factor(r_n, torch.ones_like(r_n, dtype=torch.float64))


def select(keep_n: Tensor) -> Factor:
    """The mean over the tokens that are kept."""
    return Factor(keep_n.float(), keep_n.double())


def drop(keep_n: Tensor) -> Factor:
    """Kept tokens only, over the count of all of them."""
    return plain(keep_n.float())


def product(factors: Iterable[Factor], mask_n: Tensor) -> Factor:
    """One factor of all of them, detached and 0 outside the mask, where they may hold anything.

    Raises:
        ValueError: a factor does not have one weight and one mass per token.
    """
    weight_n = mass_n = mask_n.double()
    for factor in factors:
        if not factor.weight_n.shape == factor.mass_n.shape == mask_n.shape:
            raise ValueError(
                f"a factor of weights {list(factor.weight_n.shape)} and masses {list(factor.mass_n.shape)} for "
                f"{len(mask_n)} tokens: give one of each per token"
            )
        weight_n = weight_n * factor.weight_n.detach().double()
        mass_n = mass_n * factor.mass_n.detach().double()
    return Factor(torch.where(mask_n, weight_n, 0.0).float(), torch.where(mask_n, mass_n, 0.0))


class Live(Protocol):
    """A factor that needs the current student."""

    def __call__(self, signals: Signals) -> Factor:
        """``[n]`` each. Sums over tokens go through `signals.mean` or `signals.reduce`, on every rank alike."""


class Response(Protocol):
    """What a prepared factor may read of a response: `Trajectory` says what it means."""

    problem: int
    sample: int
    response_ids: list[int]
    sampler_logprobs_R: Tensor
    finished: bool
    version_R: Tensor | None
    correct: bool | None
    block_R: Tensor
    old_logprobs_R: Tensor | None
    teacher_logprobs_R: Tensor | None
    teacher_support_RK: Tensor | None
    teacher_support_logprobs_RK: Tensor | None

    @property
    def counts(self) -> Tensor: ...


class Prepared(Protocol):
    """A factor that does not need the current student."""

    def prepare(self, responses: Sequence[Response], reduce: SumReduce) -> Sequence[Factor]:
        """One factor of ``[R]`` each per response, on the host.

        Args:
            responses: those that this replica trains on, maybe none; the other replicas are asked about theirs.
            reduce: sums a float64 tensor over the replicas. Every replica must call it equally often.
        """


def prepare(factors: Sequence[Prepared], responses: Sequence[Response], reduce: SumReduce) -> list[Factor]:
    """The product of prepared factors, for each response.

    Raises:
        ValueError: a factor does not say one thing per response, or not one per token.
    """
    said = [factor.prepare(responses, reduce) for factor in factors]
    for factor, of_responses in zip(factors, said):
        if len(of_responses) != len(responses):
            raise ValueError(
                f"{type(factor).__name__}.prepare returned {len(of_responses)} factors for {len(responses)} responses: "
                "return one per response, in their order"
            )
    return [product(together, response.counts) for response, *together in zip(responses, *said)]
