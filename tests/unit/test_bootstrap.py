import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpdg.evaluation.pass_at_k import Interval, bootstrap, pass_at_k_by_problem

COUNTS = st.lists(st.integers(0, 8), min_size=1, max_size=40)


def difference(a: object, b: object, k: int = 1) -> Interval:
    return bootstrap(pass_at_k_by_problem(8, b, k) - pass_at_k_by_problem(8, a, k))


@given(COUNTS, st.integers(1, 8))
def test_no_difference_to_oneself(counts: list[int], k: int) -> None:
    assert difference(counts, counts, k) == (0.0, 0.0, 0.0)


@given(COUNTS, st.integers(1, 8))
def test_value_is_the_estimate_and_lies_in_bounds(counts: list[int], k: int) -> None:
    values = pass_at_k_by_problem(8, counts, k)
    value, low, high = bootstrap(values)
    assert value == pytest.approx(values.mean())
    assert -1e-12 <= low <= high <= 1 + 1e-12


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30), st.randoms())
@settings(max_examples=50)
def test_order_of_problems_does_not_matter_and_direction_does(pairs: list[tuple[int, int]], random: object) -> None:
    shuffled = pairs.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (a, b), (c, d) = zip(*pairs), zip(*shuffled)
    forward = difference(a, b, 2)
    assert forward == pytest.approx(difference(c, d, 2))
    assert forward.value == pytest.approx(pass_at_k_by_problem(8, b, 2).mean() - pass_at_k_by_problem(8, a, 2).mean())
    assert difference(b, a, 2).value == pytest.approx(-forward.value)


def test_matches_resampling_problem_by_problem() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, 60), rng.integers(0, 9, 60)
    differences = (b - a) / 8
    means = differences[rng.integers(0, 60, (20_000, 60))].mean(axis=1)
    assert difference(a, b) == pytest.approx((differences.mean(), *np.quantile(means, [0.025, 0.975])), abs=0.004)


def test_coverage_of_the_interval() -> None:
    rng = np.random.default_rng(7)
    draws = rng.binomial(1, 0.4, size=(300, 100))
    intervals = [bootstrap(counts.astype(float)) for counts in draws]
    covered = np.mean([interval.low <= 0.4 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_pairing_narrows_the_interval() -> None:
    hard = np.arange(100) % 9
    better = np.minimum(hard + 1, 8)
    paired = difference(hard, better)
    alone = bootstrap(pass_at_k_by_problem(8, better, 1))
    assert paired.high - paired.low < (alone.high - alone.low) / 3
    assert paired.excludes_zero
    assert not Interval(0.1, -0.1, 0.3).excludes_zero
    assert Interval(-0.2, -0.3, -0.1).excludes_zero


def test_the_same_values_have_the_same_interval_and_words() -> None:
    values = pass_at_k_by_problem(8, [0, 1, 3, 8, 2, 5], 2)
    assert bootstrap(values) == bootstrap(values.copy())
    assert Interval(0.456, 0.401, 0.51).percent == "45.6 [40.1, 51.0]"
    assert Interval(0.123, -0.08, 0.165).points == "+12.3 [-8.0, +16.5]"
