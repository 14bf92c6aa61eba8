from fractions import Fraction
from itertools import combinations
from math import comb, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.evaluation.pass_at_k import pass_at_k, pass_at_k_by_problem


def draws(largest: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.integers(1, largest).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(draws(8))
def test_equals_enumeration_of_all_choices_of_k_responses(draw: tuple[int, int, int]) -> None:
    n, c, k = draw
    right = [True] * c + [False] * (n - c)
    choices = list(combinations(right, k))
    assert pass_at_k(n, c, k) == sum(map(any, choices)) / len(choices)


@given(draws(2000))
def test_is_the_exact_value_rounded_once(draw: tuple[int, int, int]) -> None:
    n, c, k = draw
    assert pass_at_k(n, c, k) == float(1 - Fraction(comb(n - c, k), comb(n, k)))


@given(draws(200))
def test_bounds_and_monotony(draw: tuple[int, int, int]) -> None:
    n, c, k = draw
    assert pass_at_k(n, c, 1) == c / n
    assert 0.0 <= pass_at_k(n, c, k) <= 1.0
    assert (pass_at_k(n, c, k) == 0.0) == (c == 0)
    assert pass_at_k(n, c, n) == float(c > 0)
    if k < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1)
    if c < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c + 1, k)


def test_agrees_with_the_product_form_of_the_paper() -> None:
    for c in range(193):
        product = 1.0 - prod(1.0 - 8 / i for i in range(200 - c + 1, 201))
        assert pass_at_k(200, c, 8) == pytest.approx(product, rel=1e-9, abs=1e-12)


def test_is_unbiased() -> None:
    """Mean of the estimate over binomial c is 1 - (1 - p)^k."""
    n, k, p = 8, 3, 0.3
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_by_problem() -> None:
    values = pass_at_k_by_problem(4, [0, 1, 4], 2)
    assert values.dtype == np.float64
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert pass_at_k_by_problem(4, np.array([0, 1, 4]), 2).mean() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 1, 9), "pass@9 of 8"),
        ((8, 1, 0), "k must be in"),
        ((8, 9, 1), "9 right"),
        ((8, -1, 1), "-1"),
        ((0, 0, 1), "of 0"),
    ],
)
def test_bad_counts(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([], "at least one"), ([[1]], "shape"), ([0.5], "integers"), ([True], "integers"), ([1, -1, 5], r"\[-1, 5\]")],
)
def test_bad_vectors(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k_by_problem(4, counts, 1)
