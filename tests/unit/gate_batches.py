"""A loop-based reference of the gate, and random batches for property tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.drift.gate import Gate, Gated
from megatron_bpdg.drift.partition import FixedBlocks
from megatron_bpdg.drift.signals import Segments, Signals


@dataclass(frozen=True)
class Batch:
    """Response tokens of several sequences, as the gate wants them, with a per-token loss to weigh."""

    lengths: list[int]
    logprobs_N: Tensor
    old_logprobs_N: Tensor
    mask_N: Tensor
    loss_N: Tensor
    block_size: int

    @property
    def sequence_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @property
    def block_N(self) -> Tensor:
        blocks, offset = [], 0
        for length in self.lengths:
            blocks.append(FixedBlocks(self.block_size)(torch.zeros(length)) + offset)
            offset = int(blocks[-1][-1]) + 1
        return torch.cat(blocks)

    def signals(self, **changes: Tensor) -> Signals:
        """`changes` replace the log-probs or the mask."""
        block_N = self.block_N
        return Signals(
            changes.get("logprobs_N", self.logprobs_N),
            changes.get("old_logprobs_N", self.old_logprobs_N),
            changes.get("mask_N", self.mask_N),
            blocks=Segments(block_N, int(block_N.max()) + 1),
            sequences=Segments(self.sequence_N, len(self.lengths)),
        )

    def gate(self, gate: Gate, **changes: Tensor) -> Gated:
        """`gate` on this batch, with `changes` as in `signals`."""
        return gate(self.signals(**changes))

    def loss(self, gate: Gate, **changes: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted loss sum, mass): what one micro-batch adds to an optimizer step."""
        gated = self.gate(gate, **changes)
        return (gated.weight_n * torch.where(self.mask_N, self.loss_N, 0.0)).sum(), gated.mass

    def micro_batches(self, size: int) -> list[Batch]:
        """The same sequences, `size` at a time."""
        split = []
        for first in range(0, len(self.lengths), size):
            start, end = sum(self.lengths[:first]), sum(self.lengths[: first + size])
            split.append(
                Batch(
                    self.lengths[first : first + size],
                    self.logprobs_N[start:end],
                    self.old_logprobs_N[start:end],
                    self.mask_N[start:end],
                    self.loss_N[start:end],
                    self.block_size,
                )
            )
        return split


def step_loss(gate: Gate, batches: list[Batch]) -> float:
    """Loss of a whole optimizer step: sum of loss sums over sum of masses."""
    parts = [batch.loss(gate) for batch in batches]
    return float(sum(loss.double() for loss, _ in parts) / sum(mass for _, mass in parts))


def grid(low: float, high: float) -> st.SearchStrategy[float]:
    """Multiples of 1/64: their sums and differences are exact in float32, so equalities can be asserted to the bit."""
    return st.integers(int(low * 64), int(high * 64)).map(lambda i: i / 64)


@st.composite
def batches(draw: Any, min_sequences: int = 1) -> Batch:
    """Values are seeded rather than drawn one by one (which costs ten times as much); shapes shrink, values do not."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=min_sequences, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    count = sum(lengths)

    def floats(low: int, high: int) -> Tensor:
        return torch.randint(low * 64, high * 64 + 1, (count,), generator=generator) / 64

    mask_N = torch.rand(count, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.1]))
    mask_N[draw(st.integers(0, count - 1))] = True
    old_N = floats(-6, 0)
    drift_N = floats(-2, 2) * draw(st.sampled_from([0, 1, 3]))
    return Batch(lengths, old_N + drift_N, old_N, mask_N, floats(-4, 4), block_size=draw(st.integers(1, 5)))


def naive_gate(batch: Batch, gate: Gate) -> tuple[list[float], float]:
    """(weights, mass) by scalar loops in Python floats."""
    drift = (batch.logprobs_N - batch.old_logprobs_N).tolist()
    mask, blocks, sequences = batch.mask_N.tolist(), batch.block_N.tolist(), batch.sequence_N.tolist()
    raw = [0.0] * len(drift)
    for block in set(blocks):
        members = [t for t in range(len(drift)) if blocks[t] == block and mask[t]]
        if not members:
            continue
        d = [drift[t] for t in members]
        s = {
            "abs_mean": abs(sum(d) / len(d)),
            "mean_abs": sum(abs(x) for x in d) / len(d),
            "rms": math.sqrt(sum(x * x for x in d) / len(d)),
            "k3": sum(math.exp(x) - 1 - x for x in d) / len(d),
        }[gate.aggregator]
        for t in members:
            raw[t] = max(math.exp(-gate.tau * s), gate.clip_min)
    if gate.unit_mean == "global":
        return raw, sum(raw)
    scopes = sequences if gate.unit_mean == "sequence" else [0] * len(raw)
    means = {
        scope: sum(g for g, s, m in zip(raw, scopes, mask) if m and s == scope)
        / max(sum(m for s, m in zip(scopes, mask) if s == scope), 1)
        for scope in set(scopes)
    }
    return [g / means[s] if m else 0.0 for g, s, m in zip(raw, scopes, mask)], float(sum(mask))
