"""Gate statistics: by hand, and additive over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.drift.diagnostics import BINS, drift_by_block, drift_shapes, drift_statistics, drift_sums
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.sums import NamedSums
from tests.unit.gate_batches import Batch, batches

ROWS = 6


def block_index(batch: Batch) -> Tensor:
    """Number of each block within its own sequence."""
    return torch.cat([torch.arange(-(-length // batch.block_size)) for length in batch.lengths])


def sums_of(batch: Batch, gate: Gate, rows: int = ROWS, owns_blocks: bool = True) -> NamedSums:
    return NamedSums(drift_sums(batch.gate(gate), batch.mask_N, block_index(batch), rows, owns_blocks))


def batch_of(drift: list[float], lengths: list[int], block_size: int, mask: list[bool] | None = None) -> Batch:
    drift_N = torch.tensor(drift)
    mask_N = torch.tensor(mask or [True] * len(drift))
    return Batch(lengths, drift_N, torch.zeros_like(drift_N), mask_N, drift_N, block_size)


def test_by_hand() -> None:
    batch = batch_of([1.0, 1.0, -2.0, 2.0, 0.5, 9.0], [4, 2], 2, mask=[True] * 5 + [False])
    statistics = drift_statistics(sums_of(batch, Gate()))
    g = [math.exp(-1)] * 2 + [1.0] * 2 + [math.exp(-0.5)]
    assert statistics["gate/mean"] == pytest.approx(sum(g) / 5, rel=1e-6)
    assert statistics["gate/mass"] == pytest.approx(sum(g), rel=1e-6)
    assert statistics["gate/ess"] == pytest.approx(sum(g) ** 2 / (5 * sum(x * x for x in g)), rel=1e-6)
    assert statistics["drift/abs_mean"] == pytest.approx(6.5 / 5)
    assert statistics["drift/mean"] == pytest.approx(2.5 / 5)
    assert statistics["drift/block_mean"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert statistics["gate/min"] <= math.exp(-1) <= statistics["gate/min"] + 1 / BINS
    assert statistics["gate/q95"] == 1.0
    drift, tokens = drift_by_block(sums_of(batch, Gate()))
    assert tokens == [3, 2]
    assert drift == pytest.approx([(2 * 1.0 + 1 * 0.5) / 3, 0.0])


def test_names_and_sizes_of_the_sums() -> None:
    """What a rank without tokens holds is what the others add to."""
    zeros, sums = NamedSums.zeros(drift_shapes(9)), sums_of(batch_of([1.0], [1], 1), Gate(), rows=9)
    assert {name: tuple(values.shape) for name, values in zeros.items()} == {
        name: tuple(values.shape) for name, values in sums.items()
    }
    assert {values.dtype for values in sums.values()} == {torch.float64}


def assert_same_sums(actual: NamedSums, expected: NamedSums) -> None:
    torch.testing.assert_close(dict(actual), dict(expected), rtol=1e-9, atol=1e-9)


def total(parts: list[NamedSums]) -> NamedSums:
    sums = NamedSums.zeros(drift_shapes(ROWS))
    for part in parts:
        sums.add(part)
    return sums


def test_cancellation_is_one_where_signs_agree_and_zero_where_they_cancel() -> None:
    """Uneven blocks included: block means are weighted by their tokens, like the mean over tokens they stand beside."""
    agreeing = batch_of([1.0, 1.0, 1.0, 5.0], [4], 3)
    cancelling = batch_of([1.0, -1.0, 2.0, -2.0], [4], 2)
    assert drift_statistics(sums_of(agreeing, Gate()))["drift/cancellation"] == pytest.approx(1.0)
    assert drift_statistics(sums_of(cancelling, Gate()))["drift/cancellation"] == pytest.approx(0.0, abs=1e-12)


@given(batches())
def test_cancellation_lies_between_zero_and_one(batch: Batch) -> None:
    value = drift_statistics(sums_of(batch, Gate())).get("drift/cancellation", 0.0)
    assert -1e-9 <= value <= 1.0 + 1e-6


def test_no_tokens_no_statistics() -> None:
    sums = NamedSums.zeros(drift_shapes(ROWS))
    assert drift_statistics(sums) == {}
    assert drift_by_block(sums) == ([], [])


def test_without_drift() -> None:
    statistics = drift_statistics(sums_of(batch_of([0.0, 0.0], [2], 2), Gate()))
    assert statistics["gate/mean"] == statistics["gate/ess"] == statistics["gate/q05"] == statistics["gate/min"] == 1.0
    assert "drift/cancellation" not in statistics  # 0 / 0


def test_blocks_beyond_the_last_row_share_it() -> None:
    batch = batch_of([1.0, 2.0, 3.0, 5.0], [4], 1)
    drift, tokens = drift_by_block(sums_of(batch, Gate(), rows=2))
    assert tokens == [1, 3]
    assert drift == pytest.approx([1.0, 10.0 / 3])


@given(batches(min_sequences=2), st.integers(1, 3))
def test_sums_add_up_over_micro_batches(batch: Batch, size: int) -> None:
    parts = [sums_of(part, Gate()) for part in batch.micro_batches(size)]
    assert_same_sums(total(parts), sums_of(batch, Gate()))


@given(batches())
def test_only_the_owner_counts_blocks(batch: Batch) -> None:
    """Two ranks hold half the tokens each, and complete block means both; together they report each block once."""
    whole = batch.gate(Gate())
    index_G = block_index(batch)
    half_N = torch.arange(len(batch.mask_N)) < len(batch.mask_N) // 2
    shards = [
        NamedSums(drift_sums(whole, batch.mask_N & half_N, index_G, ROWS, owns_blocks=True)),
        NamedSums(drift_sums(whole, batch.mask_N & ~half_N, index_G, ROWS, owns_blocks=False)),
    ]
    assert_same_sums(total(shards), sums_of(batch, Gate()))


@given(batches())
def test_statistics_agree_with_the_gates(batch: Batch) -> None:
    gate_N = batch.gate(Gate()).gate_n[batch.mask_N].double()
    statistics = drift_statistics(sums_of(batch, Gate()))
    assert statistics["gate/mean"] == pytest.approx(float(gate_N.mean()), rel=1e-6)
    assert 0 < statistics["gate/ess"] <= 1 + 1e-9
    assert statistics["gate/min"] <= float(gate_N.min()) + 1e-9 <= statistics["gate/min"] + 1 / BINS + 1e-6
    for name, q in (("gate/q05", 0.05), ("gate/q50", 0.5), ("gate/q95", 0.95)):
        exact = float(torch.quantile(gate_N, q, interpolation="lower"))
        above = float(torch.quantile(gate_N, q, interpolation="higher"))
        assert exact - 1 / BINS - 1e-6 <= statistics[name] <= above + 1e-6


def test_named_sums_go_through_one_collective_in_any_order_of_their_names() -> None:
    calls = []

    def twice(flat: Tensor) -> Tensor:
        calls.append(len(flat))
        return 2 * flat

    sums = NamedSums.zeros({"a": 0, "b": 3})
    for part in ({"b": torch.arange(3.0), "a": torch.tensor(5.0)}, {"a": torch.tensor(1.0), "b": torch.ones(3)}):
        sums.add(part)
    done = sums.over(twice)
    assert (calls, float(done["a"]), done["b"].tolist()) == ([4], 12.0, [2.0, 4.0, 6.0])
    assert done["b"].dtype == torch.float64


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "c"]])
def test_sums_of_other_names_are_not_added(names: list[str]) -> None:
    with pytest.raises(KeyError, match="sums that only one side has"):
        NamedSums.zeros({"a": 0, "b": 0}).add({name: torch.ones(()) for name in names})
