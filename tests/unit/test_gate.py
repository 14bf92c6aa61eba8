"""The gate: hand-computed examples, a loop-based reference, and the invariances that define the method."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.drift.gate import AGGREGATORS, Gate, UnitMean
from megatron_bpdg.drift.signals import Segments, Signals
from tests.unit.gate_batches import Batch, batches, grid, naive_gate, step_loss

SCOPES: tuple[UnitMean, ...] = ("global", "sequence", "microbatch")
gates = st.builds(
    Gate,
    tau=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    aggregator=st.sampled_from(sorted(AGGREGATORS)),
    unit_mean=st.sampled_from(SCOPES),
    clip_min=st.sampled_from([0.0, 0.4]),
)
measured_gates = gates.filter(lambda gate: gate.tau > 0 and gate.clip_min == 0)


def batch_of(drift: list[float], lengths: list[int], block_size: int, mask: list[bool] | None = None) -> Batch:
    drift_N = torch.tensor(drift)
    mask_N = torch.tensor(mask or [True] * len(drift))
    return Batch(lengths, drift_N - 2.0, torch.full_like(drift_N, -2.0), mask_N, torch.ones_like(drift_N), block_size)


def test_by_hand() -> None:
    """Two sequences in blocks of 2: means |0.5|, |-1| | 0 (cancels), 0.25."""
    batch = batch_of([0.0, 1.0, -1.0, 3.0, -3.0, 0.25], [3, 3], block_size=2)
    gated = batch.gate(Gate())
    g = [math.exp(-0.5), math.exp(-1.0), 1.0, math.exp(-0.25)]
    expected = [g[0], g[0], g[1], g[2], g[2], g[3]]
    assert gated.gate_n.tolist() == pytest.approx(expected, rel=1e-6)
    assert gated.weight_n.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(gated.mass) == pytest.approx(sum(expected), rel=1e-12)
    assert gated.block_drift_G.tolist() == [0.5, 1.0, 0.0, 0.25]
    assert gated.block_count_G.tolist() == [2, 1, 2, 1]
    assert gated.drift_n.tolist() == [0.0, 1.0, -1.0, 3.0, -3.0, 0.25]


def test_masked_tokens_keep_their_place_but_leave_the_mean() -> None:
    """Blocks of 3 with a hole in each: the hole does not move later tokens into earlier blocks."""
    batch = batch_of([1.0, 9.0, 3.0, 9.0, 5.0, 7.0], [6], block_size=3, mask=[True, False, True, False, True, True])
    gated = batch.gate(Gate(tau=0.1))
    assert gated.block_drift_G.tolist() == [2.0, 6.0]
    assert gated.block_count_G.tolist() == [2, 2]
    assert gated.weight_n[torch.tensor([1, 3])].tolist() == [0.0, 0.0]


def test_the_tail_block_has_its_own_mean() -> None:
    gated = batch_of([1.0, 1.0, 1.0, 4.0], [4], block_size=3).gate(Gate())
    assert gated.block_drift_G.tolist() == [1.0, 4.0]


def test_one_block_per_sequence_is_the_sequence_gate() -> None:
    gated = batch_of([1.0, 3.0, -2.0], [2, 1], block_size=100).gate(Gate())
    assert gated.block_drift_G.tolist() == [2.0, 2.0]


@given(batches(), gates)
def test_against_scalar_loops(batch: Batch, gate: Gate) -> None:
    weights, mass = naive_gate(batch, gate)
    gated = batch.gate(gate)
    assert gated.weight_n.tolist() == pytest.approx(weights, rel=1e-5, abs=1e-7)
    assert float(gated.mass) == pytest.approx(mass, rel=1e-9)
    assert gated.weight_n.dtype == gated.gate_n.dtype == torch.float32
    assert gated.mass.dtype == torch.float64


@given(batches(), gates)
def test_without_drift_the_gate_is_one_and_the_loss_is_the_ungated_one_to_the_bit(batch: Batch, gate: Gate) -> None:
    old_N = batch.logprobs_N.clone()
    gated = batch.gate(gate, old_logprobs_N=old_N)
    assert torch.equal(gated.gate_n, batch.mask_N.float())
    loss, mass = batch.loss(gate, old_logprobs_N=old_N)
    assert torch.equal(loss, torch.where(batch.mask_N, batch.loss_N, 0.0).sum())
    assert float(mass) == int(batch.mask_N.sum())


@given(batches(), gates)
def test_tau_zero_is_ungated_whatever_the_drift(batch: Batch, gate: Gate) -> None:
    gated = batch.gate(replace(gate, tau=0.0))
    assert torch.equal(gated.weight_n, batch.mask_N.float())
    assert float(gated.mass) == int(batch.mask_N.sum())


@given(batches(), measured_gates, grid(-2, 2))
def test_constant_drift_changes_nothing(batch: Batch, gate: Gate, constant: float) -> None:
    drifted = replace(batch, logprobs_N=batch.old_logprobs_N + constant)
    ungated = step_loss(Gate(tau=0.0), [batch])
    assert step_loss(gate, [drifted]) == pytest.approx(ungated, rel=1e-5, abs=1e-6)


@given(batches(), gates)
def test_unit_mean(batch: Batch, gate: Gate) -> None:
    """The normalised weights of the valid tokens sum to their number, within each scope."""
    gated = batch.gate(gate)
    normalised_N = gated.weight_n.double() * (batch.mask_N.sum() / gated.mass)
    assert float(normalised_N.sum()) == pytest.approx(int(batch.mask_N.sum()), rel=1e-6)
    if gate.unit_mean == "sequence":
        for sequence in range(len(batch.lengths)):
            here_N = batch.sequence_N == sequence
            assert float(normalised_N[here_N].sum()) == pytest.approx(int(batch.mask_N[here_N].sum()), rel=1e-6)


@given(batches(), gates, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_may_hold_anything(batch: Batch, gate: Gate, junk: float) -> None:
    clean = batch.gate(gate)
    for name in ("logprobs_N", "old_logprobs_N"):
        dirty = batch.gate(gate, **{name: torch.where(batch.mask_N, getattr(batch, name), junk)})
        for field in ("weight_n", "mass_n", "gate_n", "drift_n", "block_drift_G", "block_count_G"):
            assert torch.equal(getattr(dirty, field), getattr(clean, field)), field


@given(batches(), gates, st.integers(1, 7), st.sampled_from([math.nan, -3.0]))
def test_padding_touches_nothing(batch: Batch, gate: Gate, padding: int, junk: float) -> None:
    """Filler at the end repeats the first token's block and sequence, masked: what `pad_to_multiple` makes."""

    def pad(values_N: Tensor, fill: float) -> Tensor:
        return torch.cat([values_N, torch.full((padding,), fill, dtype=values_N.dtype)])

    block_N = batch.block_N
    padded = gate(
        Signals(
            pad(batch.logprobs_N, junk),
            pad(batch.old_logprobs_N, -1.0),
            pad(batch.mask_N, False),
            blocks=Segments(pad(block_N, 0), int(block_N.max()) + 1),
            sequences=Segments(pad(batch.sequence_N, 0), len(batch.lengths)),
        )
    )
    clean = batch.gate(gate)
    assert torch.equal(padded.weight_n[:-padding], clean.weight_n)
    assert not padded.weight_n[-padding:].any()
    # A longer tensor is summed in another order: float64's last bit.
    assert float(padded.mass) == pytest.approx(float(clean.mass), rel=1e-14)
    assert torch.equal(padded.block_drift_G, clean.block_drift_G)


@given(batches(min_sequences=2), measured_gates, grid(-3, 3))
def test_a_sequence_does_not_feel_its_neighbours(batch: Batch, gate: Gate, shift: float) -> None:
    """Raw gates depend on their own block only; so does everything under the scope `sequence`."""
    first_N = batch.sequence_N == 0
    changed_N = torch.where(first_N, batch.logprobs_N, batch.logprobs_N + shift)
    before, after = batch.gate(gate), batch.gate(gate, logprobs_N=changed_N)
    assert torch.equal(before.gate_n[first_N], after.gate_n[first_N])
    if gate.unit_mean == "sequence":
        assert torch.equal(before.weight_n[first_N], after.weight_n[first_N])


@given(batches(min_sequences=2), gates.filter(lambda gate: gate.unit_mean != "microbatch"), st.integers(1, 3))
def test_micro_batches_give_the_loss_of_one_big_batch(batch: Batch, gate: Gate, size: int) -> None:
    assert step_loss(gate, batch.micro_batches(size)) == pytest.approx(step_loss(gate, [batch]), rel=1e-5, abs=1e-6)


def test_the_scopes_are_really_different() -> None:
    """Under `microbatch` the loss depends on the layout, under the others it does not; all three differ."""
    batch = replace(
        batch_of([0.0, 0.0, 2.0, 0.0, 1.0, 1.0], [4, 2], block_size=2),
        loss_N=torch.tensor([1.0, 2.0, 5.0, 3.0, -1.0, 4.0]),
    )
    whole = {scope: step_loss(Gate(unit_mean=scope), [batch]) for scope in SCOPES}
    split = {scope: step_loss(Gate(unit_mean=scope), batch.micro_batches(1)) for scope in SCOPES}
    assert split["global"] == pytest.approx(whole["global"], rel=1e-6)
    assert split["sequence"] == pytest.approx(whole["sequence"], rel=1e-6)
    assert abs(split["microbatch"] - whole["microbatch"]) > 0.05
    # With a single micro-batch the two coincide by definition; one sequence per micro-batch makes it `sequence`.
    assert whole["microbatch"] == pytest.approx(whole["global"], rel=1e-6)
    assert split["microbatch"] == pytest.approx(split["sequence"], rel=1e-6)
    assert abs(whole["sequence"] - whole["global"]) > 0.05


@given(batches())
def test_global_scope_is_the_papers_formula(batch: Batch) -> None:
    """sum m g l / sum m g == sum m (g / mean g) l / sum m."""
    gated = batch.gate(Gate())
    gate_N, loss_N = gated.gate_n[batch.mask_N].double(), batch.loss_N[batch.mask_N].double()
    paper = (gate_N / gate_N.mean() * loss_N).sum() / len(loss_N)
    assert step_loss(Gate(), [batch]) == pytest.approx(float(paper), rel=1e-5, abs=1e-6)


@given(batches())
def test_at_tau_one_the_gate_is_the_ratio_folded_at_one(batch: Batch) -> None:
    """min(r, 1/r) with r the block's geometric-mean ratio pi / pi_old: GSPO's ratio at block scale."""
    gated = batch.gate(Gate(tau=1.0))
    for block in batch.block_N[batch.mask_N].unique():
        members_N = (batch.block_N == block) & batch.mask_N
        ratios = (batch.logprobs_N[members_N] - batch.old_logprobs_N[members_N]).double().exp()
        r = float(ratios.prod() ** (1.0 / len(ratios)))
        assert gated.gate_n[members_N].tolist() == pytest.approx([min(r, 1 / r)] * len(ratios), rel=1e-5)


@pytest.mark.parametrize("aggregator", sorted(AGGREGATORS))
def test_only_the_signed_mean_cancels(aggregator: str) -> None:
    gated = batch_of([1.5, -1.5], [2], block_size=2).gate(Gate(aggregator=aggregator))
    expected = {
        "abs_mean": 0.0,
        "mean_abs": 1.5,
        "rms": 1.5,
        "k3": (math.exp(1.5) - 2.5 + math.exp(-1.5) + 0.5) / 2,
    }
    assert float(gated.block_drift_G) == pytest.approx(expected[aggregator], abs=1e-12)


@given(batches(), st.sampled_from(sorted(AGGREGATORS)), st.sampled_from([0.1, 0.5, 1.0]))
def test_clip_bounds_the_raw_gate(batch: Batch, aggregator: str, clip_min: float) -> None:
    free = batch.gate(Gate(aggregator=aggregator)).gate_n[batch.mask_N]
    clipped = batch.gate(Gate(aggregator=aggregator, clip_min=clip_min)).gate_n[batch.mask_N]
    assert torch.equal(clipped, free.clamp(min=clip_min))


@given(batches(), gates)
def test_gates_lie_in_the_unit_interval(batch: Batch, gate: Gate) -> None:
    gated = batch.gate(gate)
    gate_N = gated.gate_n
    # exp(-88) is about the smallest normal float32.
    representable_N = batch.mask_N & (gate.tau * gated.block_drift_G[batch.block_N] < 87)
    assert bool((gate_N[representable_N] > 0).all())
    assert bool((gate_N <= 1).all())
    assert not gate_N[~batch.mask_N].any()


@given(batches(), gates)
def test_the_gate_is_detached(batch: Batch, gate: Gate) -> None:
    """The gradient of the gated loss is the weight times the gradient of the loss, and nothing more."""
    logprobs_N = batch.logprobs_N.clone().requires_grad_()
    gated = batch.gate(gate, logprobs_N=logprobs_N)
    assert not gated.weight_n.requires_grad
    assert not gated.mass.requires_grad
    (gradient_N,) = torch.autograd.grad((gated.weight_n * logprobs_N.square()).sum(), logprobs_N)
    assert torch.equal(gradient_N, gated.weight_n * 2 * batch.logprobs_N)


@given(batches(min_sequences=2), gates)
def test_an_entirely_masked_sequence_counts_for_nothing(batch: Batch, gate: Gate) -> None:
    alive_N = batch.mask_N & (batch.sequence_N != 0)
    assume(bool(alive_N.any()))
    gated = batch.gate(gate, mask_N=alive_N)
    assert bool(gated.weight_n.isfinite().all())
    rest = batch.micro_batches(1)[1:]
    assert float(gated.mass) == pytest.approx(sum(float(b.gate(gate).mass) for b in rest if b.mask_N.any()), rel=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_empty_micro_batch_has_no_mass(scope: UnitMean) -> None:
    gated = batch_of([1.0, 2.0], [2], 2, mask=[True, True]).gate(
        Gate(unit_mean=scope),
        mask_N=torch.tensor([False, False]),
    )
    assert gated.weight_n.tolist() == [0.0, 0.0]
    assert float(gated.mass) == 0.0


@given(batches())
def test_bfloat16_log_probs_are_subtracted_in_float32(batch: Batch) -> None:
    logprobs_N, old_N = batch.logprobs_N.bfloat16(), batch.old_logprobs_N.bfloat16()
    low = batch.gate(Gate(), logprobs_N=logprobs_N, old_logprobs_N=old_N)
    high = batch.gate(Gate(), logprobs_N=logprobs_N.float(), old_logprobs_N=old_N.float())
    assert torch.equal(low.weight_n, high.weight_n)


def test_mean_of_segments() -> None:
    mask_n, zero_n = torch.tensor([True, True, False, True]), torch.zeros(4)
    blocks = Segments(torch.tensor([0, 0, 0, 2]), 3)
    signals = Signals(zero_n, zero_n, mask_n, blocks, Segments(torch.zeros(4, dtype=torch.int64), 1))
    mean_G, count_G = signals.mean(torch.tensor([1.0, 3.0, math.nan, 5.0]), blocks)
    assert mean_G.tolist() == [2.0, 0.0, 5.0]
    assert count_G.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregator": "median"}, "abs_mean, mean_abs, rms, k3"),
        ({"tau": -1.0}, "tau must not be negative"),
        ({"unit_mean": "batch"}, "global, sequence or microbatch"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**settings)  # type: ignore[arg-type]
