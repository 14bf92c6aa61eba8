"""The head: logits, hidden gradient and weight gradient against the dense product, sequence parallel or not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import DenseVocab
from tests.parallel.spawn import run_ranks

SEQUENCE, BATCH, HIDDEN, VOCAB = 8, 3, 5, 10
# Out of order, one position twice, several positions (and one whole shard of them) not at all.
POSITIONS = [17, 3, 3, 20, 5, 11, 4, 1]
SAMPLED = [0, 9, 3, 2, 4, 7, 5, 6]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [S, B, H], weight [V_padded, H] for 4 ranks, upstream gradient [N, V_padded])."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(SEQUENCE, BATCH, HIDDEN), normal(12, HIDDEN), normal(len(POSITIONS), 12)


def dense(loss_of: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """(logits, hidden gradient, weight gradient, loss) on one process."""
    hidden_SBH, weight_VH, upstream_NV = inputs()
    hidden_SBH.requires_grad_()
    weight_VH.requires_grad_()
    logits_NV = (hidden_SBH @ weight_VH.t()).flatten(0, 1)[torch.tensor(POSITIONS)]
    if loss_of == "logits":
        loss = (logits_NV * upstream_NV).sum()
    else:
        loss = (DenseVocab(logits_NV, VOCAB).logprob(torch.tensor(SAMPLED)) * upstream_NV[:, 0]).sum()
    loss.backward()
    assert hidden_SBH.grad is not None
    assert weight_VH.grad is not None
    return logits_NV.detach(), hidden_SBH.grad, weight_VH.grad, loss.item()


def on_ranks() -> dict[str, dict[str, float]]:
    from megatron_bpdg.parallel.head import project
    from megatron_bpdg.parallel.platform import cpu_platform
    from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()

    def shard(whole: Tensor, dim: int = 0) -> Tensor:
        return whole.chunk(size, dim=dim)[rank].clone()

    report = {}
    for sequence_parallel, scattered, loss_of in itertools.product((False, True), (False, True), ("logits", "logprob")):
        hidden_SBH, weight_VH, upstream_NV = inputs()
        hidden = (shard(hidden_SBH) if sequence_parallel else hidden_SBH).requires_grad_()
        weight = shard(weight_VH).requires_grad_()
        with cpu_platform():
            logits_NV = project(
                hidden, weight, torch.tensor(POSITIONS), group=group, sequence_parallel=sequence_parallel
            )
            if loss_of == "logits":
                loss = (logits_NV * shard(upstream_NV, dim=1)).sum()
                everywhere = loss.detach().clone()
                dist.all_reduce(everywhere)
            else:
                ops = ParallelVocab(logits_NV, VOCAB, TokenLayout(group, scattered))
                loss = (ops.logprob(torch.tensor(SAMPLED)) * ops.rows(upstream_NV[:, 0])).sum()
                everywhere = loss.detach().clone()
                if scattered:
                    dist.all_reduce(everywhere)
            loss.backward()
        expected_logits, expected_hidden, expected_weight, expected_loss = dense(loss_of)
        if sequence_parallel:
            expected_hidden = shard(expected_hidden)
        assert hidden.grad is not None
        assert weight.grad is not None
        report[f"sp={sequence_parallel} scattered={scattered} {loss_of}"] = {
            "logits": float((logits_NV - shard(expected_logits, dim=1)).abs().max()),
            "hidden": float((hidden.grad - expected_hidden).abs().max()),
            "weight": float((weight.grad - shard(expected_weight)).abs().max()),
            "loss": abs(float(everywhere) - expected_loss),
        }
    return report


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_projection_is_the_dense_product(world_size: int) -> None:
    """Summed over the group exactly once: neither a partial hidden gradient nor one that is TP times too large."""
    _, hidden, weight, _ = dense("logprob")
    assert float(hidden.abs().max()) > 0.1
    assert float(weight[:VOCAB].abs().max()) > 0.1
    for rank in run_ranks(on_ranks, world_size):
        report: dict[str, Any] = rank
        assert len(report) == 8
        assert not {
            f"{name} {field}": error
            for name, errors in report.items()
            for field, error in errors.items()
            if not error < 1e-12
        }
