"""Inverse-CDF sampling: exact cut points, the right frequencies, and one stream of uniforms per response."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.rollout.sampling import draw, sample_seed, uniforms

BELOW_ONE = 1.0 - 2.0**-53  # the largest value that torch.rand can give in float64


def draw_ids(probs_V: Tensor, uniform_B: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    ids_B, _ = draw(probs_V.log().expand(len(uniform_B), -1), uniform_B, temperature, top_p)
    return ids_B


def test_cut_points_are_the_cumulative_distribution() -> None:
    probs_V = torch.tensor([0.25, 0.5, 0.125, 0.125])
    uniform_B = torch.tensor([0.0, 0.249, 0.251, 0.749, 0.751, 0.874, 0.876, BELOW_ONE], dtype=torch.float64)
    assert draw_ids(probs_V, uniform_B).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_frequencies_match_the_distribution(temperature: float, top_p: float) -> None:
    """Chi-square at 6 degrees of freedom or fewer: beyond 22.5 with probability 0.001, under a fixed seed."""
    logits_V = torch.tensor([0.3, -1.0, 1.2, 0.0, -2.0, 0.7, 0.2])
    probs_V = (logits_V / temperature).double().softmax(-1)
    ranked_V, order_V = probs_V.sort(descending=True)
    nucleus = int((ranked_V.cumsum(0) < top_p).sum()) + 1 if top_p < 1.0 else len(probs_V)
    expected_V = torch.zeros_like(probs_V)
    expected_V[order_V[:nucleus]] = ranked_V[:nucleus] / ranked_V[:nucleus].sum()

    count = 20_000
    (uniform_B,) = uniforms([5], count)
    ids_B, _ = draw(logits_V.expand(count, -1), uniform_B, temperature, top_p)
    observed_V = torch.bincount(ids_B, minlength=len(probs_V)).double()
    assert observed_V[expected_V == 0].sum() == 0
    here = expected_V > 0
    chi_square = float(((observed_V - count * expected_V)[here].square() / (count * expected_V[here])).sum())
    assert chi_square < 22.5


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_ids_of_probability_zero_are_never_drawn(top_p: float) -> None:
    # Zeros at both ends and in the middle: each of them shares a cumulative value with a neighbour.
    probs_V = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    uniform_B = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 0.5 + 2**-53, BELOW_ONE], dtype=torch.float64)
    assert set(draw_ids(probs_V, uniform_B, top_p=top_p).tolist()) == {1, 4}


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 0.9, 0.999]), st.sampled_from([0.3, 1.0, 1.7]))
def test_top_p_keeps_exactly_the_nucleus(seed: int, top_p: float, temperature: float) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    probs_V = (logits_V / temperature).log_softmax(-1).double().exp()
    ranked_V, order_V = probs_V.sort(descending=True)
    nucleus: set[int] = set()
    mass = 0.0
    for id_, prob in zip(order_V.tolist(), ranked_V.tolist()):
        nucleus.add(id_)
        mass += prob
        if mass >= top_p:
            break
    # Finer than the smallest member of any nucleus here, so that every one of them is hit.
    uniform_B = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    ids_B, _ = draw(logits_V.expand(4096, -1), uniform_B, temperature, top_p)
    drawn = set(ids_B.tolist())
    assert drawn <= nucleus
    assert {id_ for id_ in nucleus if float(probs_V[id_]) > 2 / 4096} <= drawn


def test_a_tiny_top_p_is_the_greedy_choice() -> None:
    probs_V = torch.tensor([0.2, 0.3, 0.1, 0.4])
    uniform_B = torch.tensor([0.0, 0.5, BELOW_ONE], dtype=torch.float64)
    assert draw_ids(probs_V, uniform_B, top_p=1e-9).tolist() == [3, 3, 3]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_refer_to_the_full_distribution_at_the_temperature(top_p: float, temperature: float) -> None:
    logits_BV = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)) * 3
    (uniform_B,) = uniforms([2], 40)
    ids_B, logprobs_B = draw(logits_BV, uniform_B, temperature, top_p)
    expected_B = (logits_BV.double() / temperature).log_softmax(-1)[torch.arange(40), ids_B]
    torch.testing.assert_close(logprobs_B.double(), expected_B, rtol=1e-6, atol=1e-6)
    assert logprobs_B.dtype == torch.float32


def test_low_precision_logits_are_widened_before_the_softmax() -> None:
    logits_BV = torch.randn(8, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    (uniform_B,) = uniforms([4], 8)
    for exact, widened in zip(draw(logits_BV.float(), uniform_B, 0.8, 0.9), draw(logits_BV, uniform_B, 0.8, 0.9)):
        assert torch.equal(exact, widened)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(top_p: float) -> None:
    logits_BV = torch.randn(30, 17, generator=torch.Generator().manual_seed(7)) * 2
    seeds = [sample_seed(0, 1, row) for row in range(30)]
    uniform_BT = uniforms(seeds, 3)
    ids_B, logprobs_B = draw(logits_BV, uniform_BT[:, 1], 1.0, top_p)
    for rows in ([4], [29, 4, 0], list(range(29, -1, -1))):
        alone_BT = uniforms([seeds[row] for row in rows], 3)
        ids_b, logprobs_b = draw(logits_BV[rows], alone_BT[:, 1], 1.0, top_p)
        assert torch.equal(ids_b, ids_B[rows])
        assert torch.equal(logprobs_b, logprobs_B[rows])


def test_uniforms_depend_on_their_own_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    both_BT = uniforms([11, 12], 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(both_BT[1], uniforms([12], 6)[0])
    assert torch.equal(both_BT[0, :4], uniforms([11], 4)[0])  # a longer limit does not change the beginning
    assert not torch.equal(both_BT[0], both_BT[1])
    assert both_BT.dtype == torch.float64
    assert bool(((both_BT >= 0) & (both_BT < 1)).all())


def test_sample_seeds_differ_over_runs_streams_steps_problems_and_samples() -> None:
    places = list(product((0, 1, 17), (1, 2, 3), range(12), range(40), range(16)))
    seeds = {sample_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Swapped and shifted paths are other places.
    assert len({sample_seed(0, 1, 2), sample_seed(0, 2, 1), sample_seed(1, 0, 2), sample_seed(0, 1, 2, 0)}) == 4


def test_neighbouring_seeds_give_unrelated_streams() -> None:
    uniform_BT = uniforms([sample_seed(0, 1, 1, 0, sample) for sample in range(64)], 64)
    correlation_BB = torch.corrcoef(uniform_BT)
    off_diagonal = correlation_BB[~torch.eye(64, dtype=torch.bool)].abs()
    assert float(off_diagonal.max()) < 0.6  # 4.8 standard deviations of 1/8
    assert abs(float(uniform_BT.mean()) - 0.5) < 0.02
