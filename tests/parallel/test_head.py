"""The head: loss, hidden gradient and weight gradient against the dense product, with logits and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.head import Head, HeadKind, response_states
from tests.parallel.spawn import run_ranks

SEQUENCE, BATCH, HIDDEN, VOCAB = 8, 3, 5, 10
# Out of order, one position twice, several positions (and one whole shard of them) not at all.
POSITIONS = [17, 3, 3, 20, 5, 11, 4, 1]
SAMPLED = [0, 9, 3, 2, 4, 7, 5, 6]
# Repeats, and the first and last id of shards.
SUPPORT = [[1, 8, 1], [0, 9, 2], [3, 3, 3], [5, 6, 9], [2, 0, 7], [9, 9, 0], [4, 5, 6], [8, 1, 3]]


# Three columns of 8 tokens, one gathered row.
CHUNK_MB = 100e-6
TEMPERATURE = 0.8
# Name -> [n, K] or [n, 1] of the operations.
LOSSES: dict[str, Callable[[VocabOps], Tensor]] = {
    "logprob": lambda ops: ops.logprob(torch.tensor(SAMPLED))[:, None],
    "gather": lambda ops: ops.gather(torch.tensor(SUPPORT)),
    "tail": lambda ops: ops.gather(torch.tensor(SUPPORT)) - ops.logsumexp()[:, None],
    "entropy": lambda ops: ops.entropy()[:, None],
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [S, B, H], weight [V_padded, H] for 4 ranks, upstream gradient [N, K])."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(SEQUENCE, BATCH, HIDDEN), normal(12, HIDDEN), normal(len(POSITIONS), len(SUPPORT[0]))


def dense(loss_of: str) -> tuple[Tensor, Tensor, float]:
    """(hidden gradient, weight gradient, loss) on one process."""
    hidden_SBH, weight_VH, upstream_NK = inputs()
    hidden_SBH.requires_grad_()
    weight_VH.requires_grad_()
    logits_NV = (hidden_SBH @ weight_VH.t()).flatten(0, 1)[torch.tensor(POSITIONS)]
    loss = (LOSSES[loss_of](DenseVocab(logits_NV, VOCAB, TEMPERATURE)) * upstream_NK).sum()
    loss.backward()
    assert hidden_SBH.grad is not None
    assert weight_VH.grad is not None
    return hidden_SBH.grad, weight_VH.grad, loss.item()


def gradient_errors(kinds: Sequence[HeadKind], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Largest differences to the dense product in float64, on this rank, by layout, head and loss."""
    from megatron_bpdg.parallel.vocab import TokenLayout
    from tests.cpu import cpu_platform

    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()

    def shard(whole: Tensor, dim: int = 0) -> Tensor:
        return whole.chunk(size, dim=dim)[rank].clone()

    report = {}
    for sequence_parallel, scattered, kind, loss_of in itertools.product((False, True), (False, True), kinds, LOSSES):
        head = Head(kind, chunk_mb=CHUNK_MB)
        hidden_SBH, weight_VH, upstream_NK = (tensor.to(dtype) for tensor in inputs())
        hidden = (shard(hidden_SBH) if sequence_parallel else hidden_SBH).requires_grad_()
        weight = shard(weight_VH).requires_grad_()
        with cpu_platform():
            hidden_NH = response_states(
                hidden, torch.tensor(POSITIONS), group=group, sequence_parallel=sequence_parallel
            )
            ops = head.vocab_ops(hidden_NH, weight, VOCAB, TokenLayout(group, scattered), TEMPERATURE, accumulate=False)
            loss = (LOSSES[loss_of](ops) * ops.rows(upstream_NK)).sum()
            everywhere = loss.detach().clone()
            if scattered:
                dist.all_reduce(everywhere)
            loss.backward()
        expected_hidden, expected_weight, expected_loss = dense(loss_of)
        if sequence_parallel:
            expected_hidden = shard(expected_hidden)
        assert hidden.grad is not None
        assert weight.grad is not None
        report[f"sp={sequence_parallel} scattered={scattered} {kind} {loss_of}"] = {
            "hidden": float((hidden.grad - expected_hidden).abs().max()),
            "weight": float((weight.grad - shard(expected_weight)).abs().max()),
            "loss": abs(float(everywhere) - expected_loss),
        }
    return report


def above(report: dict[str, dict[str, float]], limit: float) -> dict[str, float]:
    """The errors that are not below the limit, NaN included."""
    errors = {f"{name} {field}": error for name, fields in report.items() for field, error in fields.items()}
    return {name: error for name, error in errors.items() if not error < limit}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_those_of_the_dense_product(world_size: int) -> None:
    """Summed over the group exactly once: neither a partial hidden gradient nor one that is TP times too large."""
    for loss_of in LOSSES:
        hidden, weight, _ = dense(loss_of)
        assert float(hidden.abs().max()) > 0.1
        assert float(weight[:VOCAB].abs().max()) > 0.1
    kinds = ("materialised", "chunked")
    for report in run_ranks(gradient_errors, world_size, kinds, torch.float64):
        assert len(report) == 8 * len(LOSSES)
        assert not above(report, 1e-12)
