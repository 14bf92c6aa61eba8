"""pass@k: the chance that at least one of k responses is right (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate ``1 - C(n-c, k) / C(n, k)`` from c right ones of n responses, as a fraction.

    Integer arithmetic up to one division: the result is the exact one, rounded once.

    Raises:
        ValueError: unless ``1 <= k <= n`` and ``0 <= c <= n``.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} responses: k must be in 1..{n}; draw more samples or lower k")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right ones of {n} responses: must be in 0..{n}")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_at_k_by_problem(n: int, correct_P: Sequence[int] | NDArray[np.integer], k: int) -> Floats:
    """`pass_at_k` of every problem.

    Args:
        n: responses per problem.
        correct_P: right ones of each problem, integers ``[P]``.
        k: as in pass@k.

    Returns:
        float64 ``[P]``, fractions.

    Raises:
        ValueError: as `pass_at_k`, or there are no problems.
    """
    counts_P = np.asarray(correct_P)
    if counts_P.ndim != 1 or not counts_P.size:
        raise ValueError(
            f"counts of right responses have shape {counts_P.shape}: should be one per problem, at least one"
        )
    if not np.issubdtype(counts_P.dtype, np.integer):
        raise ValueError(f"counts of right responses are {counts_P.dtype}: should be integers")
    table_C = _table(n, k)
    if outside := [int(c) for c in counts_P if not 0 <= c <= n]:
        raise ValueError(f"counts of right responses {outside[:5]} are outside 0..{n}")
    return table_C[counts_P]


def mean_pass_at_k(n: int, correct_P: Sequence[int] | NDArray[np.integer], k: int) -> float:
    """Mean of `pass_at_k_by_problem` over the problems."""
    return float(pass_at_k_by_problem(n, correct_P, k).mean())


@lru_cache(maxsize=256)
def _table(n: int, k: int) -> Floats:
    return np.array([pass_at_k(n, c, k) for c in range(n + 1)], dtype=np.float64)
