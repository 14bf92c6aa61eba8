"""Objectives on dense operations: scalar loops, closed forms, and gradients in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor
from torch.autograd import gradcheck

from megatron_bpdg.config.objective import ObjectiveConfig
from megatron_bpdg.drift.signals import Segments, Signals, TeacherSignal
from megatron_bpdg.objectives.divergence import divergence, forward_kl, jsd, reverse_kl
from megatron_bpdg.objectives.local_support import local_support_loss, log_rest
from megatron_bpdg.objectives.sampled_token import sampled_token_loss
from megatron_bpdg.objectives.vocabulary import DenseVocab, ordered_topk
from megatron_bpdg.training.method import build_objective

N, V, K = 5, 9, 4
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": lambda p, q, total: jsd(p, q, total, 0.3)}


def normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def last_sum(terms: Tensor) -> Tensor:
    return terms.sum(-1)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def naive_divergence(name: str, p: list[float], q: list[float], beta: float = 0.3) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


# -- divergences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_against_scalar_loops(name: str) -> None:
    log_p, log_q = normal(N, V, seed=1).log_softmax(-1), normal(N, V, seed=2).log_softmax(-1)
    actual = DIVERGENCES[name](log_p, log_q, last_sum)
    expected = [naive_divergence(name, p, q) for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist())]
    assert actual.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradcheck(name: str) -> None:
    log_q = normal(N, V, seed=2).log_softmax(-1)
    logits = normal(N, V, seed=1).requires_grad_()
    assert gradcheck(lambda z: DIVERGENCES[name](z.log_softmax(-1), log_q, last_sum), (logits,))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_equals_is_zero_with_zero_gradient(name: str) -> None:
    logits = normal(N, V).requires_grad_()
    loss = DIVERGENCES[name](logits.log_softmax(-1), logits.detach().log_softmax(-1), last_sum)
    assert float(loss.detach().abs().max()) < 1e-14
    assert float(gradient(loss, logits).abs().max()) < 1e-14


@pytest.mark.parametrize("name", DIVERGENCES)
def test_impossible_outcomes_are_exact(name: str) -> None:
    """An outcome impossible for both contributes nothing, in the loss and in the gradient: as if it were not there."""
    logits, teacher = normal(N, V, seed=1), normal(N, V, seed=2)
    logits[:, 3] = teacher[:, 3] = -math.inf
    logits.requires_grad_()
    loss = DIVERGENCES[name](logits.log_softmax(-1), teacher.log_softmax(-1), last_sum)
    without = [0, 1, 2, 4, 5, 6, 7, 8]
    fewer = logits.detach()[:, without].requires_grad_()
    expected = DIVERGENCES[name](fewer.log_softmax(-1), teacher[:, without].log_softmax(-1), last_sum)
    torch.testing.assert_close(loss, expected)
    grad = gradient(loss, logits)
    torch.testing.assert_close(grad[:, without], gradient(expected, fewer))
    assert not grad[:, 3].any()


def test_one_sided_impossible_outcomes() -> None:
    """KL is infinite where its second argument excludes what its first allows; JSD never is."""
    log_p = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]], dtype=torch.float64)
    log_q = torch.tensor([[math.log(0.5), -math.inf, math.log(0.5)]], dtype=torch.float64)
    assert forward_kl(log_p, log_q, last_sum).item() == math.inf
    assert reverse_kl(log_p, log_q, last_sum).item() == math.inf
    # m = (1/2, 1/4, 1/4): half of each distribution stands at twice its mixture.
    assert jsd(log_p, log_q, last_sum).item() == pytest.approx(0.5 * math.log(2))
    log_p.requires_grad_()
    assert bool(gradient(jsd(log_p, log_q, last_sum), log_p).isfinite().all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_is_not_hidden(name: str) -> None:
    """A NaN on either side, next to an impossible outcome or not, reaches its row and no other."""
    for position, other in itertools.product((0, 1), (0.0, -math.inf)):
        pair = [torch.zeros(2, 3, dtype=torch.float64).log_softmax(-1) for _ in range(2)]
        pair[position][0, 1] = math.nan
        pair[1 - position][0, 1] = other
        loss = DIVERGENCES[name](pair[0], pair[1], last_sum)
        assert loss.isnan().tolist() == [True, False]


@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_jsd_is_bounded_and_symmetric(seed: int, beta: float) -> None:
    log_p, log_q = normal(3, V, seed=seed, scale=4).log_softmax(-1), normal(3, V, seed=seed + 1).log_softmax(-1)
    value = jsd(log_p, log_q, last_sum, beta)
    bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert bool((value >= -1e-12).all())
    assert bool((value <= bound + 1e-12).all())
    torch.testing.assert_close(value, jsd(log_q, log_p, last_sum, 1 - beta))


def test_unknown_divergences_are_refused() -> None:
    with pytest.raises(ValueError, match="forward_kl, reverse_kl or jsd"):
        divergence("hellinger", 0.5)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            jsd(torch.zeros(1, 2), torch.zeros(1, 2), last_sum, beta)


# -- sampled token ----------------------------------------------------------------------------------------------------


def naive_sampled_token(
    logp: float, old: float, teacher: float, online: bool, clamp: float | None, clip: float, dual: float | None
) -> tuple[float, float]:
    """(loss, d loss / d logp) of one token."""
    advantage = teacher - (logp if online else old)
    if clamp is not None:
        advantage = max(-clamp, min(clamp, advantage))
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    surrogates = [(-advantage * ratio, -advantage * ratio), (-advantage * clipped, 0.0)]
    # Inside the clip range both are the same function: the unclipped one carries the gradient.
    loss, slope = max(surrogates, key=lambda pair: pair[0])
    if dual is not None and advantage < 0 and loss > -advantage * dual:
        return -advantage * dual, 0.0
    return loss, slope


@given(
    st.integers(0, 2**31),
    st.sampled_from(["behaviour", "online"]),
    st.sampled_from([None, 0.7, 5.0]),
    st.sampled_from([0.1, 0.2]),
    st.sampled_from([None, 1.5, 3.0]),
)
def test_sampled_token_against_scalar_loops(
    seed: int, advantage: Literal["behaviour", "online"], clamp: float | None, clip: float, dual: float | None
) -> None:
    """Loss and gradient, with ratios on both sides of both clips."""
    logp, old, teacher = (-normal(20, seed=seed + i).abs() for i in range(3))
    logp.requires_grad_()
    loss = sampled_token_loss(logp, old, teacher, advantage=advantage, advantage_clamp=clamp, clip=clip, dual_clip=dual)
    expected = [
        naive_sampled_token(*values, advantage == "online", clamp, clip, dual)
        for values in zip(logp.tolist(), old.tolist(), teacher.tolist())
    ]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12)
    assert gradient(loss, logp).tolist() == pytest.approx([e[1] for e in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 1.0, -1.1, -1.1),  # inside the clip
        (1.5, 1.0, -1.2, 0.0),  # a good token pushed far enough
        (0.5, 1.0, -0.5, -0.5),  # a good token that got rarer: pull it back
        (0.5, -1.0, 0.8, 0.0),  # a bad token pushed far enough
        (2.0, -1.0, 2.0, 2.0),  # a bad token that got likelier
        (5.0, -1.0, 3.0, 0.0),  # ... so much that the dual clip bounds it
    ],
)
def test_clips_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    actual = sampled_token_loss(logp, old, old + advantage)
    assert actual.item() == pytest.approx(loss)
    assert gradient(actual, logp).item() == pytest.approx(slope)


@pytest.mark.parametrize("advantage", ["behaviour", "online"])
def test_sampled_token_gradcheck(advantage: Literal["behaviour", "online"]) -> None:
    """Through the dense log-prob, away from the kinks; finite differences would move the `online` baseline."""
    ids = torch.tensor([0, 3, 3, 8, 1])
    logits = normal(N, V).requires_grad_()
    old = DenseVocab(logits, V).logprob(ids).detach() + 0.05 * normal(N, seed=3)
    teacher = DenseVocab(normal(N, V, seed=2), V).logprob(ids)
    baseline = {"behaviour": old, "online": DenseVocab(logits, V).logprob(ids).detach()}[advantage]

    def fixed_baseline(z: Tensor) -> Tensor:
        # A behaviour advantage relative to `old` with this teacher equals the wanted one.
        return sampled_token_loss(DenseVocab(z, V).logprob(ids), old, teacher - baseline + old)

    assert gradcheck(fixed_baseline, (logits,))
    actual = sampled_token_loss(DenseVocab(logits, V).logprob(ids), old, teacher, advantage=advantage)
    torch.testing.assert_close(gradient(actual, logits), gradient(fixed_baseline(logits), logits))


def test_gradient_flows_through_the_current_student_only() -> None:
    logp, old, teacher = (normal(4, seed=i).requires_grad_() for i in range(3))
    sampled_token_loss(logp, old, teacher).sum().backward()
    assert logp.grad is not None
    assert old.grad is None
    assert teacher.grad is None


def test_the_two_advantages_agree_on_policy() -> None:
    logp, teacher = normal(4), normal(4, seed=1)
    losses = [sampled_token_loss(logp, logp, teacher, advantage=name) for name in ("behaviour", "online")]
    assert torch.equal(*losses)


def test_expected_gradient_on_policy_is_that_of_the_reverse_kl() -> None:
    """Averaged over the student's own samples, the policy gradient is the gradient of KL(pi || q), not zero."""
    logits, teacher = normal(1, V).requires_grad_(), DenseVocab(normal(1, V, seed=1), V)
    expected = gradient(reverse_kl(DenseVocab(logits, V).log_softmax(), teacher.log_softmax(), last_sum), logits)
    probabilities = logits.detach().softmax(-1)[0]
    average = torch.zeros_like(logits)
    for token in range(V):
        ids = torch.tensor([token])
        logp = DenseVocab(logits, V).logprob(ids)
        loss = sampled_token_loss(logp, logp.detach(), teacher.logprob(ids))
        average += probabilities[token] * gradient(loss, logits)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(average, expected)


# -- local support ----------------------------------------------------------------------------------------------------

Outside = Literal["renormalise", "tail_bucket"]


def lsm(
    logits: Tensor,
    support: Tensor,
    teacher: Tensor,
    name: str = "reverse_kl",
    outside: Outside = "renormalise",
    sampled: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`local_support_loss` with dense operations and a teacher given by its logits."""
    said = DenseVocab(teacher, teacher.shape[1], temperature)
    return local_support_loss(
        DenseVocab(logits, logits.shape[1], temperature),
        support,
        said.gather(support) - said.logsumexp()[:, None],
        DIVERGENCES[name],
        outside=outside,
        extra=None if sampled is None else (sampled, said.logprob(sampled)),
    )


def naive_lsm(
    logits: Tensor,
    support: Tensor,
    teacher: Tensor,
    name: str,
    outside: Outside,
    sampled: Tensor | None,
    temperature: float,
) -> list[float]:
    """Outcome by outcome on Python floats."""
    p_NV, q_NV = ((z / temperature).softmax(-1).tolist() for z in (logits, teacher))
    losses = []
    for row, (p, q) in enumerate(zip(p_NV, q_NV)):
        ids = support[row].tolist()
        if sampled is not None and int(sampled[row]) not in ids:
            ids.append(int(sampled[row]))
        ps, qs = [p[v] for v in ids], [q[v] for v in ids]
        if outside == "renormalise":
            ps, qs = [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
        elif len(ids) < len(p):
            ps, qs = [*ps, 1 - sum(ps)], [*qs, 1 - sum(qs)]
        losses.append(naive_divergence(name, ps, qs))
    return losses


def case(seed: int = 0, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student logits, support, teacher logits, sampled): rows with the sample inside and outside the support."""
    logits, teacher = normal(N, V, seed=seed), normal(N, V, seed=seed + 1)
    support = torch.rand(N, V, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :k]
    sampled = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    sampled[0] = support[0, -1]
    sampled[1] = next((v for v in range(V) if v not in support[1]), 0)
    return logits, support, teacher, sampled


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("outside", ["renormalise", "tail_bucket"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, K, V - 1, V])
def test_local_support_against_scalar_loops(
    k: int, name: str, outside: Outside, append: bool, temperature: float
) -> None:
    """K = V - 1 with the sample appended: the support is complete in some rows and not in others."""
    logits, support, teacher, sampled = case(k=k)
    extra = sampled if append else None
    actual = lsm(logits, support, teacher, name, outside, extra, temperature)
    expected = naive_lsm(logits, support, teacher, name, outside, extra, temperature)
    assert actual.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("outside", ["renormalise", "tail_bucket"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [K, V])
def test_local_support_gradcheck(k: int, name: str, outside: Outside, append: bool) -> None:
    logits, support, teacher, sampled = case(k=k)
    extra = sampled if append else None
    assert gradcheck(
        lambda z: lsm(z, support, teacher, name, outside, extra, temperature=0.8), (logits.requires_grad_(),)
    )


@given(st.integers(0, 2**31), st.integers(1, V))
def test_gradient_is_the_closed_form(seed: int, k: int) -> None:
    """dl/dz_v = p_v (log(p_v / q_v) - l) on the support, 0 elsewhere."""
    logits, support, teacher, _ = case(seed, k)
    logits.requires_grad_()
    loss = lsm(logits, support, teacher)
    log_p, log_q = logits.detach().gather(1, support).log_softmax(-1), teacher.gather(1, support).log_softmax(-1)
    closed = torch.zeros(N, V, dtype=torch.float64)
    closed.scatter_(1, support, log_p.exp() * (log_p - log_q - loss.detach()[:, None]))
    actual = gradient(loss, logits)
    torch.testing.assert_close(actual, closed)
    off = torch.ones(N, V, dtype=torch.bool).scatter_(1, support, False)
    assert not actual[off].any()


def test_full_support_is_the_full_divergence() -> None:
    logits, support, teacher, sampled = case(k=V)
    whole = reverse_kl(logits.log_softmax(-1), teacher.log_softmax(-1), last_sum)
    for outside, extra in itertools.product(("renormalise", "tail_bucket"), (None, sampled)):
        torch.testing.assert_close(lsm(logits, support, teacher, outside=outside, sampled=extra), whole)  # type: ignore[arg-type]


def test_renormalised_loss_ignores_mass_outside_the_support_and_a_tail_bucket_does_not() -> None:
    logits, support, teacher, _ = case()
    leaked = logits.clone()
    leaked.scatter_add_(1, support, torch.full(support.shape, -3.0, dtype=torch.float64))
    torch.testing.assert_close(lsm(leaked, support, teacher), lsm(logits, support, teacher))
    before, after = (lsm(z, support, teacher, outside="tail_bucket") for z in (logits, leaked))
    assert float((after - before).abs().min()) > 0.01


def test_appending_a_sample_inside_the_support_changes_nothing() -> None:
    logits, support, teacher, _ = case()
    logits.requires_grad_()
    inside = support[:, 2]
    for outside in ("renormalise", "tail_bucket"):
        plain, appended = (lsm(logits, support, teacher, outside=outside, sampled=s) for s in (None, inside))
        torch.testing.assert_close(appended, plain)
        torch.testing.assert_close(gradient(appended, logits), gradient(plain, logits))


def test_appending_a_sample_outside_the_support_widens_it() -> None:
    logits, support, teacher, _ = case()
    outside = torch.tensor([next(v for v in range(V) if v not in row) for row in support.tolist()])
    wider = torch.cat([support, outside[:, None]], dim=1)
    torch.testing.assert_close(lsm(logits, support, teacher, sampled=outside), lsm(logits, wider, teacher))


def test_ids_that_repeat_are_separate_outcomes_whose_gradients_add_up() -> None:
    logits, _, teacher, _ = case()
    logits.requires_grad_()
    support = torch.tensor([[2, 5, 2]]).expand(N, -1)
    loss = lsm(logits, support, teacher)
    twins = torch.cat([logits, logits[:, 2:3]], dim=1).detach().requires_grad_()
    expected = lsm(twins, torch.tensor([[2, 5, V]]).expand(N, -1), torch.cat([teacher, teacher[:, 2:3]], dim=1))
    torch.testing.assert_close(loss, expected)
    grad, twin_grad = gradient(loss, logits), gradient(expected, twins)
    torch.testing.assert_close(grad[:, 2], twin_grad[:, 2] + twin_grad[:, V])


@pytest.mark.parametrize("outside", ["renormalise", "tail_bucket"])
def test_an_impossible_student_logit_in_the_support(outside: Outside) -> None:
    """p = 0 contributes 0 to the reverse KL; loss and gradient stay finite."""
    logits, support, teacher, _ = case()
    logits[torch.arange(N), support[:, 0]] = -math.inf
    logits.requires_grad_()
    loss = lsm(logits, support, teacher, outside=outside)
    expected = naive_lsm(logits.detach(), support, teacher, "reverse_kl", outside, None, 1.0)
    assert loss.tolist() == pytest.approx(expected)
    grad = gradient(loss, logits)
    assert bool(grad.isfinite().all())
    assert not grad[torch.arange(N), support[:, 0]].any()


@pytest.mark.parametrize("outside", ["renormalise", "tail_bucket"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_the_teacher_is_at_rest(name: str, outside: Outside) -> None:
    logits, support, _, sampled = case()
    logits.requires_grad_()
    loss = lsm(logits, support, logits.detach(), name, outside, sampled)
    assert float(loss.detach().abs().max()) < 1e-12
    assert float(gradient(loss, logits).abs().max()) < 1e-12


def test_the_remaining_mass_is_floored_not_negative() -> None:
    """In float32 a support that holds all the mass can sum to slightly more than 1."""
    logprobs = torch.tensor([[math.log(0.25), math.log(0.5)], [0.0, math.log(1e-3)]])
    rest = log_rest(logprobs)
    assert rest[0].item() == pytest.approx(math.log(0.25))
    assert rest[1].item() == pytest.approx(math.log(torch.finfo(torch.float32).eps))


# -- dense vocabulary operations --------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[DenseVocab], Tensor]] = {
    "logsumexp": lambda ops: ops.logsumexp(),
    "logprob": lambda ops: ops.logprob(torch.tensor([0, 3, 3, 8, 1])),
    "gather": lambda ops: ops.gather(torch.tensor([[3, 3, 8]]).expand(N, -1)),
    "entropy": lambda ops: ops.entropy(),
    "vocab_sum": lambda ops: ops.vocab_sum(ops.log_softmax().square()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_dense_operations_gradcheck(name: str) -> None:
    assert gradcheck(lambda z: OPERATIONS[name](DenseVocab(z, V, temperature=0.7)), (normal(N, V).requires_grad_(),))


def test_dense_operations_by_definition() -> None:
    logits = normal(N, V)
    ops = DenseVocab(logits, V, temperature=0.7)
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(ops.entropy(), -(p * p.log()).sum(-1))
    torch.testing.assert_close(ops.logprob(torch.full((N,), 2)), p[:, 2].log())
    torch.testing.assert_close(ops.vocab_sum(ops.log_softmax().exp()), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("name", OPERATIONS)
def test_padding_columns_never_matter(name: str) -> None:
    """Padding may hold anything and gets no gradient."""
    logits = normal(N, V)
    expected = OPERATIONS[name](DenseVocab(logits, V))
    for junk in (1e4, math.nan, math.inf):
        padded = torch.cat([logits, torch.full((N, 3), junk, dtype=torch.float64)], dim=1).requires_grad_()
        actual = OPERATIONS[name](DenseVocab(padded, V))
        assert torch.equal(actual, expected)
        assert not gradient(actual, padded)[:, V:].any()


def test_entropy_with_impossible_ids() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]], requires_grad=True)
    entropy = DenseVocab(logits, 3).entropy()
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0])
    assert bool(gradient(entropy, logits).isfinite().all())


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_nan_stays_in_its_row(name: str) -> None:
    clean = normal(N, V)
    broken = clean.clone()
    broken[2, 0] = math.nan
    broken.requires_grad_()
    actual = OPERATIONS[name](DenseVocab(broken, V))
    assert actual.reshape(N, -1).isnan().any(1).tolist() == [False, False, name != "gather", False, False]
    others = torch.arange(N) != 2
    assert torch.equal(actual[others], OPERATIONS[name](DenseVocab(clean, V))[others])
    assert bool(gradient(actual, broken)[others].isfinite().all())


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = normal(N, V).bfloat16()
    assert DenseVocab(logits, V).logsumexp().dtype == torch.float32
    assert torch.equal(DenseVocab(logits, V).logsumexp(), DenseVocab(logits.float(), V).logsumexp())


@pytest.mark.parametrize("ids", [[[-1]], [[V]]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit a vocabulary of 9"):
        DenseVocab(normal(1, V + 4), V).gather(torch.tensor(ids))


def test_topk_orders_ties_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [-math.inf, -1.0, -math.inf, -0.0, 0.0]])
    values, ids = DenseVocab(logits, 5).topk(4)
    assert ids.tolist() == [[1, 2, 4, 0], [3, 4, 1, 0]]
    assert values.tolist() == [[2.0, 2.0, 2.0, 1.0], [0.0, 0.0, -1.0, -math.inf]]
    for k in (0, 6):
        with pytest.raises(ValueError, match="top_k must be between 1 and the vocabulary size 5"):
            DenseVocab(logits, 5).topk(k)


@given(st.integers(0, 2**31), st.integers(1, 600), st.integers(1, 12))
def test_ordered_topk_is_a_stable_sort(seed: int, rows: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (rows, 12), generator=generator).float() / 3
    expected = values.sort(dim=1, descending=True, stable=True)
    actual, ids = ordered_topk(values, k, first_id=100)
    assert torch.equal(actual, expected.values[:, :k])
    assert torch.equal(ids, expected.indices[:, :k] + 100)


# -- objectives by name -----------------------------------------------------------------------------------------------


def build(**config: Any) -> Any:
    return build_objective(TypeAdapter(ObjectiveConfig).validate_python(config))


def test_objectives_read_what_they_say_they_need() -> None:
    assert build(name="lsm", top_k=3).needs.top_k == 3
    assert not build(name="lsm", top_k=3).needs.full
    assert build(name="jsd").needs.full
    assert build(name="sampled_token").differentiates_logprob
    assert not build(name="sampled_token").needs.full


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "sampled_token", "advantage": "online", "clip": 0.1, "dual_clip": 2.0}, "sampled_token"),
        ({"name": "lsm", "top_k": K}, "lsm"),
        ({"name": "lsm", "top_k": K, "divergence": "jsd", "jsd_beta": 0.3, "append_sampled": True}, "lsm_jsd"),
        ({"name": "lsm", "top_k": K, "outside": "tail_bucket", "divergence": "forward_kl"}, "lsm_tail"),
        ({"name": "forward_kl"}, "forward_kl"),
        ({"name": "reverse_kl"}, "reverse_kl"),
        ({"name": "jsd", "jsd_beta": 0.3}, "jsd"),
        ({"name": "sft"}, "sft"),
    ],
)
def test_every_field_of_a_config_arrives(config: dict[str, Any], expected: str) -> None:
    logits, _, teacher, sampled = case()
    student, said = DenseVocab(logits, V), DenseVocab(teacher, V)
    logp, old = student.logprob(sampled), student.logprob(sampled) + normal(N, seed=9, scale=0.5)
    values, support = said.topk(K)
    signal = TeacherSignal(said.logprob(sampled), support, values - said.logsumexp()[:, None], said.log_softmax())
    everything = Segments(torch.zeros_like(sampled), 1)
    log_p, log_q = student.log_softmax(), said.log_softmax()
    losses = {
        "sampled_token": lambda: sampled_token_loss(
            logp, old, signal.logprobs_n, advantage="online", clip=0.1, dual_clip=2.0
        ),
        "lsm": lambda: lsm(logits, support, teacher),
        "lsm_jsd": lambda: lsm(logits, support, teacher, "jsd", sampled=sampled),
        "lsm_tail": lambda: lsm(logits, support, teacher, "forward_kl", "tail_bucket"),
        "sft": lambda: -logp,
        **{name: lambda name=name: DIVERGENCES[name](log_p, log_q, last_sum) for name in DIVERGENCES},  # type: ignore[misc]
    }
    signals = Signals(
        logp, old, torch.ones_like(sampled, dtype=torch.bool), everything, everything, sampled_N=sampled, teacher=signal
    )
    actual = build(**config)(student, signals)
    torch.testing.assert_close(actual, losses[expected]())


def test_a_ratio_beyond_the_float_range_has_a_finite_gradient() -> None:
    """exp would overflow; a clipped-away infinity has the gradient 0 * inf."""
    logprobs_N = torch.tensor([-0.1, -0.1], requires_grad=True)
    old_logprobs_N = torch.tensor([-200.0, -200.0])
    loss_N = sampled_token_loss(logprobs_N, old_logprobs_N, torch.tensor([-150.0, -250.0]))
    loss_N.sum().backward()
    assert loss_N.tolist() == pytest.approx([-50.0 * 1.2, 50.0 * 3.0])
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [0.0, 0.0]
