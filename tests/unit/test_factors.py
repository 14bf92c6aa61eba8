"""Factors: products, and that a step's quotient does not depend on how its tokens are dealt out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.controllers.factor import Factor, drop, plain, prepare, product, select, unit_mean
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import no_reduce
from tests.unit.gate_batches import Batch, batches


def factors_of(batch: Batch, seed: int) -> list[Factor]:
    """Gate x importance weights x kept tokens x dropped ones."""
    generator = torch.Generator().manual_seed(seed)
    r_n, u_n, v_n = torch.rand(3, len(batch.mask_N), generator=generator, dtype=torch.float64)
    return [batch.gate(Gate()), plain(3.0 * r_n), select(u_n > 0.3), drop(v_n > 0.2)]


def naive(factors: list[Factor], mask_n: Tensor, loss_n: Tensor) -> tuple[float, float]:
    """(numerator, denominator) by scalar loops."""
    above = below = 0.0
    for t in range(len(mask_n)):
        if mask_n[t]:
            weight, mass = 1.0, 1.0
            for factor in factors:
                weight, mass = weight * float(factor.weight_n[t]), mass * float(factor.mass_n[t])
            above, below = above + weight * float(loss_n[t]), below + mass
    return above, below


@given(batches(), st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_a_product_is_exact_under_any_split(batch: Batch, seed: int, parts: int) -> None:
    factors = factors_of(batch, seed)
    above, below = naive(factors, batch.mask_N, batch.loss_N)
    assume(below > 0)
    whole = product(factors, batch.mask_N)
    part_n = torch.randint(0, parts, batch.mask_N.shape, generator=torch.Generator().manual_seed(seed))
    sums = torch.zeros(2, dtype=torch.float64)
    for part in range(parts):
        here_n = part_n == part
        mine = product([Factor(f.weight_n[here_n], f.mass_n[here_n]) for f in factors], batch.mask_N[here_n])
        sums += torch.stack([(mine.weight_n.double() * batch.loss_N[here_n]).sum(), mine.mass])
    assert float(whole.mass) == pytest.approx(below, rel=1e-12)
    assert float(sums[1]) == pytest.approx(below, rel=1e-12)
    assert float(sums[0]) == pytest.approx(above, rel=1e-5, abs=1e-5)


@given(batches(), st.sampled_from(["global", "sequence", "microbatch"]))
def test_the_gate_alone_is_the_gate_to_the_bit(batch: Batch, scope: Any) -> None:
    gated = batch.gate(Gate(unit_mean=scope))
    whole = product([gated, product([], batch.mask_N)], batch.mask_N)
    assert torch.equal(whole.weight_n, gated.weight_n)
    assert torch.equal(whole.mass_n, gated.mass_n)
    assert torch.equal(whole.mass, gated.mass)


def test_the_kinds_by_hand() -> None:
    """Loss 1, 2, 4 with weights 0.5, 0, 1."""
    loss_n, w_n = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 1.0])
    quotients = {
        kind.__name__: float((kind(w_n).weight_n * loss_n).sum() / kind(w_n).mass)
        for kind in (unit_mean, plain, select, drop)
    }
    assert quotients == {
        "unit_mean": pytest.approx(4.5 / 1.5),
        "plain": pytest.approx(4.5 / 3),
        "select": pytest.approx(4.5 / 1.5),
        "drop": pytest.approx(4.5 / 3),
    }
    assert float((select(w_n > 0).weight_n * loss_n).sum() / select(w_n > 0).mass) == 2.5


def test_nothing_outside_the_mask_is_read_and_nothing_has_a_gradient() -> None:
    mask_n = torch.tensor([True, False])
    r_n = torch.tensor([2.0, torch.nan], requires_grad=True)
    whole = product([plain(r_n), unit_mean(torch.tensor([0.5, torch.inf]))], mask_n)
    assert (whole.weight_n.tolist(), whole.mass_n.tolist()) == ([1.0, 0.0], [0.5, 0.0])
    assert (whole.weight_n.dtype, whole.mass_n.dtype) == (torch.float32, torch.float64)
    assert not whole.weight_n.requires_grad


def test_a_factor_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \[1\] and masses \[1\] for 2 tokens: give one of each per token"):
        product([plain(torch.ones(1))], torch.tensor([True, True]))


def test_prepared_factors_multiply_per_response() -> None:
    class Length:
        def prepare(self, batch: Any, reduce: Any) -> list[Factor]:
            return [plain(torch.full((len(r.counts),), float(len(r.counts)))) for r in batch]

    class OneTooMany(Length):
        def prepare(self, batch: Any, reduce: Any) -> list[Factor]:
            return [*super().prepare(batch, reduce), plain(torch.ones(1))]

    batch: Any = [SimpleNamespace(counts=torch.tensor(c)) for c in ([True, True], [True, False, True])]
    two = prepare([Length(), Length()], batch, no_reduce)
    assert [f.weight_n.tolist() for f in two] == [[4.0, 4.0], [9.0, 0.0, 9.0]]
    assert [f.mass_n.tolist() for f in two] == [[1.0, 1.0], [1.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match=r"OneTooMany\.prepare returned 3 factors for 2 responses"):
        prepare([OneTooMany()], batch, no_reduce)
