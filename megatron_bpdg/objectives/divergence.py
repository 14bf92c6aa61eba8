"""Divergences between student pi and teacher q, written once for any set of outcomes.

`total` sums over the outcomes: `VocabOps.vocab_sum` for the whole vocabulary, a plain sum over the last dimension for a
local support. Log-probabilities of -inf are outcomes of probability zero and are treated exactly (0 log 0 = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
Divergence = Callable[[Tensor, Tensor, Total], Tensor]


def forward_kl(log_pi: Tensor, log_q: Tensor, total: Total) -> Tensor:
    """KL(q || pi), mass-covering; infinite where pi is zero and q is not."""
    return total(kl_terms(log_q, log_pi))


def reverse_kl(log_pi: Tensor, log_q: Tensor, total: Total) -> Tensor:
    """KL(pi || q), mode-seeking; infinite where q is zero and pi is not."""
    return total(kl_terms(log_pi, log_q))


def jsd(log_pi: Tensor, log_q: Tensor, total: Total, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, eq. 1).

    ``beta * KL(q || m) + (1 - beta) * KL(pi || m)`` with ``m = beta * q + (1 - beta) * pi``.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"jsd: beta must lie strictly between 0 and 1, got {beta}")
    impossible = (log_pi == -torch.inf) & (log_q == -torch.inf)
    log_m = torch.logaddexp(
        torch.where(impossible, 0.0, log_q) + math.log(beta), torch.where(impossible, 0.0, log_pi) + math.log1p(-beta)
    )
    return total(beta * kl_terms(log_q, log_m) + (1.0 - beta) * kl_terms(log_pi, log_m))


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``a (log a - log b)`` of each outcome, 0 where a is."""
    # Both arguments are replaced before exp and subtraction: 0 * inf in the backward would be NaN.
    possible = log_a > -torch.inf
    log_a = torch.where(possible | log_a.isnan(), log_a, 0.0)
    log_b = torch.where(possible | log_b.isnan(), log_b, 0.0)
    terms = log_a.exp() * (log_a - log_b)
    return torch.where(possible | terms.isnan(), terms, 0.0)


def divergence(name: str, beta: float) -> Divergence:
    """The function for a config name: forward_kl, reverse_kl or jsd (with its beta)."""
    if name == "jsd":
        return lambda log_pi, log_q, total: jsd(log_pi, log_q, total, beta)
    try:
        return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name]
    except KeyError:
        raise ValueError(f"divergence {name!r}: choose forward_kl, reverse_kl or jsd") from None
