"""pass@k: the chance that at least one of k responses is right (Chen et al. 2021, arXiv 2107.03374, section 2.1).

Its intervals are percentile bootstraps over problems (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
COVERAGE = 0.95


class Interval(NamedTuple):
    """A fraction, or a difference of two, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0

    @property
    def percent(self) -> str:
        """A fraction: 45.6 [40.1, 51.0]."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def points(self) -> str:
        """A difference in percentage points: +12.3 [+8.0, +16.5]."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


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
    """`pass_at_k` of every problem, of which n responses each were drawn: fractions ``[P]``.

    Raises:
        ValueError: as `pass_at_k`, or the counts are no integers ``[P]``, at least one.
    """
    counts_P = np.asarray(correct_P)
    if counts_P.ndim != 1 or not counts_P.size:
        raise ValueError(
            f"counts of right responses have shape {counts_P.shape}: should be one per problem, at least one"
        )
    if not np.issubdtype(counts_P.dtype, np.integer):
        raise ValueError(f"counts of right responses are {counts_P.dtype}: should be integers")
    if outside := [int(c) for c in counts_P if not 0 <= c <= n]:
        raise ValueError(f"counts of right responses {outside[:5]} are outside 0..{n}")
    return np.array([pass_at_k(n, int(c), k) for c in counts_P], dtype=np.float64)


def bootstrap(values_P: Floats) -> Interval:
    """Mean of the problems' values, with its interval over the problems that a benchmark might have had.

    For a difference on the same problems the values are differences: both sides are resampled together.
    """
    # Drawing P problems with replacement is drawing how often each distinct value comes up: few values, small memory,
    # and the order of the problems cannot matter.
    distinct_U, counts_U = np.unique(values_P, return_counts=True)
    drawn_RU = np.random.default_rng(0).multinomial(values_P.size, counts_U / values_P.size, size=RESAMPLES)
    means_R = drawn_RU @ distinct_U / values_P.size
    low, high = np.quantile(means_R, [(1.0 - COVERAGE) / 2.0, (1.0 + COVERAGE) / 2.0])
    return Interval(float(values_P.mean()), float(low), float(high))
