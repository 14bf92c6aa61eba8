import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpdg.evaluation.bootstrap import Interval, bootstrap, paired_bootstrap
from megatron_bpdg.evaluation.pass_at_k import mean_pass_at_k

COUNTS = st.lists(st.integers(0, 8), min_size=1, max_size=40)


@given(COUNTS, st.integers(1, 8))
def test_no_difference_to_oneself(counts: list[int], k: int) -> None:
    assert paired_bootstrap(counts, counts, 8, k, resamples=50) == (0.0, 0.0, 0.0)


@given(COUNTS, st.integers(1, 8), st.integers(0, 3))
def test_value_is_the_estimate_and_lies_in_bounds(counts: list[int], k: int, seed: int) -> None:
    value, low, high = bootstrap(counts, 8, k, resamples=50, seed=seed)
    assert value == pytest.approx(mean_pass_at_k(8, counts, k))
    assert -1e-12 <= low <= high <= 1 + 1e-12


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30), st.randoms())
@settings(max_examples=50)
def test_order_of_problems_does_not_matter_and_direction_does(pairs: list[tuple[int, int]], random: object) -> None:
    shuffled = pairs.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (a, b), (c, d) = zip(*pairs), zip(*shuffled)
    forward = paired_bootstrap(a, b, 8, 2, resamples=200)
    assert forward == pytest.approx(paired_bootstrap(c, d, 8, 2, resamples=200))
    assert forward.value == pytest.approx(mean_pass_at_k(8, b, 2) - mean_pass_at_k(8, a, 2))
    assert paired_bootstrap(b, a, 8, 2, resamples=200).value == pytest.approx(-forward.value)


def test_matches_resampling_problem_by_problem() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, 60), rng.integers(0, 9, 60)
    ours = paired_bootstrap(a, b, 8, 1, resamples=20_000, seed=1)
    differences = (b - a) / 8
    means = differences[rng.integers(0, 60, (20_000, 60))].mean(axis=1)
    assert ours == pytest.approx((differences.mean(), *np.quantile(means, [0.025, 0.975])), abs=0.004)


def test_coverage_of_the_interval() -> None:
    rng = np.random.default_rng(7)
    draws = rng.binomial(1, 0.4, size=(300, 100))
    intervals = [bootstrap(counts, 1, 1, resamples=500, seed=index) for index, counts in enumerate(draws)]
    covered = np.mean([interval.low <= 0.4 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_pairing_narrows_the_interval() -> None:
    hard = np.arange(100) % 9
    better = np.minimum(hard + 1, 8)
    paired = paired_bootstrap(hard, better, 8, 1)
    alone = bootstrap(better, 8, 1)
    assert paired.high - paired.low < (alone.high - alone.low) / 3
    assert paired.excludes_zero
    assert not Interval(0.1, -0.1, 0.3).excludes_zero
    assert Interval(-0.2, -0.3, -0.1).excludes_zero


def test_seed_and_level() -> None:
    counts = [0, 1, 3, 8, 2, 5]
    assert bootstrap(counts, 8, 2, seed=1) == bootstrap(counts, 8, 2, seed=1)
    assert bootstrap(counts, 8, 1, seed=1, resamples=99) != bootstrap(counts, 8, 1, seed=2, resamples=99)
    narrow, wide = bootstrap(counts, 8, 2, level=0.5), bootstrap(counts, 8, 2, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="a has 2 problems and b 1"):
        paired_bootstrap([1, 2], [1], 8, 1)
    with pytest.raises(ValueError, match="resamples = 0"):
        bootstrap([1], 8, 1, resamples=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1], 8, 1, level=1.0)
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap([], [], 8, 1)
    with pytest.raises(ValueError, match=r"outside 0\.\.8"):
        paired_bootstrap([9], [1], 8, 1)
