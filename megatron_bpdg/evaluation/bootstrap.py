"""Percentile bootstrap over problems (Efron 1979) for pass@k and for differences of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_bpdg.evaluation.pass_at_k import Floats, pass_at_k_by_problem

Counts = Sequence[int] | NDArray[np.integer]


class Interval(NamedTuple):
    """A fraction, or a difference of two, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def bootstrap(
    correct_P: Counts, n: int, k: int, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """pass@k with its interval over the problems a benchmark might have had.

    Args:
        correct_P: right ones among the n responses of each problem, integers ``[P]``.
        n: responses per problem.
        k: as in pass@k.
        resamples: bootstrap samples.
        seed: of the resampling.
        level: coverage of the interval.

    Raises:
        ValueError: counts, k, resamples or level out of range.
    """
    return _percentile(pass_at_k_by_problem(n, correct_P, k), resamples, seed, level)


def paired_bootstrap(
    a_correct_P: Counts,
    b_correct_P: Counts,
    n: int,
    k: int,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """pass@k of b minus pass@k of a on the same problems in the same order; problems are resampled in pairs.

    Other arguments as `bootstrap`.

    Raises:
        ValueError: counts, k, resamples or level out of range; a and b differ in their number of problems.
    """
    a_P, b_P = pass_at_k_by_problem(n, a_correct_P, k), pass_at_k_by_problem(n, b_correct_P, k)
    if a_P.shape != b_P.shape:
        raise ValueError(f"a has {a_P.size} problems and b {b_P.size}: a paired comparison needs the same problems")
    return _percentile(b_P - a_P, resamples, seed, level)


def _percentile(values_P: Floats, resamples: int, seed: int, level: float) -> Interval:
    if resamples < 1:
        raise ValueError(f"resamples = {resamples} must be at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level = {level} must be between 0 and 1")
    # Drawing P problems with replacement is drawing how often each distinct value comes up: few values, small memory,
    # and the order of the problems cannot matter.
    distinct_U, counts_U = np.unique(values_P, return_counts=True)
    drawn_RU = np.random.default_rng(seed).multinomial(values_P.size, counts_U / values_P.size, size=resamples)
    means_R = drawn_RU @ distinct_U / values_P.size
    low, high = np.quantile(means_R, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(values_P.mean()), float(low), float(high))
