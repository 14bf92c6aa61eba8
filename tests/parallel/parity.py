"""Is a vocab-parallel implementation the dense one, in value *and in gradient*?

The bugs this looks for leave the loss right and only the gradient wrong, so every check compares both, rank by rank,
with a dense float64 reference on one process. `parity` runs on the ranks; it takes the implementation as an argument,
so that the same checker can be shown to fail on broken ones (test_planted_bugs.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from megatron_bpdg.config.objective import ObjectiveConfig
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import Segments, Signals, TeacherSignal, no_reduce
from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.sequence import sum_over
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout
from megatron_bpdg.training.method import build_objective
from tests.parallel.parity_inputs import CASES, JUNK, Case, Inputs, build_inputs

MakeOps = Callable[[Tensor, int, TokenLayout, float], VocabOps]
"""(logits shard, true vocabulary size, layout, temperature) -> operations; `ParallelVocab` is one."""


@dataclass(frozen=True)
class View:
    """What a check sees: a student's operations, the teacher's signal, and the inputs cut to this rank's rows."""

    student: VocabOps
    teacher: VocabOps
    inputs: Inputs
    columns: slice
    reduce: Callable[[Tensor], Tensor]

    def rows(self, name: str) -> Tensor:
        return self.student.rows(getattr(self.inputs, name))

    @cached_property
    def signal(self) -> TeacherSignal:
        support_NK = self.inputs.support_NK
        support_logprobs = self.teacher.gather(support_NK) - self.teacher.logsumexp()[:, None]
        return TeacherSignal(
            self.teacher.logprob(self.inputs.sampled_N),
            support_NK,
            support_logprobs,
            self.teacher.log_softmax().detach(),
        )

    def signals(self, logprobs_n: Tensor) -> Signals:
        return Signals(
            logprobs_n,
            self.rows("old_logprobs_N"),
            self.rows("mask_N"),
            blocks=Segments(self.rows("block_N"), 4),
            sequences=Segments(self.rows("sequence_N"), 2),
            reduce=self.reduce,
            sampled_N=self.inputs.sampled_N,
            teacher=self.signal,
        )


Check = Callable[[View], Tensor]
"""A per-token result, one value per row of this rank."""


def _weighted_log_softmax(view: View) -> Tensor:
    log_p = view.student.log_softmax()
    log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
    return view.student.vocab_sum(log_p * view.inputs.coefficient_NV[:, view.columns].to(log_p.dtype))


def _weighted_gather(view: View) -> Tensor:
    logits_nK = view.student.gather(view.inputs.support_NK)
    coefficient_nK = view.rows("coefficient_NV")[:, :1] + torch.arange(logits_nK.shape[1])
    return (torch.where(logits_nK == -torch.inf, 0.0, logits_nK) * coefficient_nK.to(logits_nK.dtype)).sum(-1)


def _unnormalised_topk_kl(view: View) -> Tensor:
    """Forward KL over the support alone, of a teacher whose mass on it is below 1: sum_S q (log q - log pi)."""
    log_q = view.signal.support_logprobs_nK
    assert log_q is not None
    log_p = view.student.gather(view.inputs.support_NK) - view.student.logsumexp()[:, None]
    possible = (log_q > -torch.inf) & (log_p != -torch.inf)
    return (log_q.exp() * torch.where(possible, log_q - log_p, 0.0)).sum(-1)


OPERATIONS: dict[str, Check] = {
    "logsumexp": lambda view: view.student.logsumexp(),
    "logprob": lambda view: view.student.logprob(view.inputs.sampled_N),
    "gather": _weighted_gather,
    "entropy": lambda view: view.student.entropy(),
    "log_softmax": _weighted_log_softmax,
    "unnormalised_topk_kl": _unnormalised_topk_kl,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "sampled_token": {"name": "sampled_token"},
    "sampled_token_online": {"name": "sampled_token", "advantage": "online", "advantage_clamp": 5.0},
    "lsm": {"name": "lsm"},
    "lsm_appended": {"name": "lsm", "append_sampled": True},
    "lsm_tail": {"name": "lsm", "outside": "tail_bucket"},
    "lsm_tail_appended": {"name": "lsm", "outside": "tail_bucket", "append_sampled": True},
    "lsm_forward": {"name": "lsm", "divergence": "forward_kl"},
    "lsm_jsd": {"name": "lsm", "divergence": "jsd", "outside": "tail_bucket"},
    "forward_kl": {"name": "forward_kl"},
    "reverse_kl": {"name": "reverse_kl"},
    "jsd": {"name": "jsd", "jsd_beta": 0.3},
}


def objective_check(config: dict[str, Any]) -> Check:
    objective = build_objective(TypeAdapter(ObjectiveConfig).validate_python(config))

    def check(view: View) -> Tensor:
        with torch.set_grad_enabled(objective.differentiates_logprob):
            logprobs_n = view.student.logprob(view.inputs.sampled_N)
        signals = view.signals(logprobs_n)
        return objective(view.student, replace(signals, old_logprobs_n=signals.old_logprobs_n.to(logprobs_n.dtype)))

    return check


OBJECTIVES: dict[str, Check] = {name: objective_check(config) for name, config in CONFIGS.items()}


def gated_check(base: str, gate: Gate) -> Check:
    """The base objective under the gate, over this micro-batch's mass."""

    def check(view: View) -> Tensor:
        gated = gate(view.signals(view.student.logprob(view.inputs.sampled_N)))
        # Replicated rows are each rank's own whole batch; scattered shares add up. `reduce` knows which.
        mass = view.reduce(gated.mass.clone()).clamp(min=1e-300)
        loss_n = torch.where(view.rows("mask_N"), OBJECTIVES[base](view), 0.0)
        return gated.weight_n * loss_n / mass.to(loss_n.dtype)

    return check


GATED: dict[str, Check] = {
    f"gated_{base}_{scope}": gated_check(base, Gate(unit_mean=scope, aggregator=aggregator))  # type: ignore[arg-type]
    for base, scope, aggregator in (
        ("sampled_token", "global", "abs_mean"),
        ("lsm", "global", "rms"),
        ("lsm_tail", "sequence", "k3"),
        ("reverse_kl", "microbatch", "mean_abs"),
    )
}
CHECKS: dict[str, Check] = {**OPERATIONS, **OBJECTIVES, **GATED}

# Infinite by definition where the student excludes what the teacher allows; inf - inf has no gradient to compare.
_INFINITE = {"forward_kl", "lsm_forward"}


@dataclass(frozen=True)
class Error:
    """Largest differences from the dense reference, relative to the reference's own size where that exceeds 1."""

    value: float
    gradient: float
    modified: bool = False

    def within(self, tolerance: tuple[float, float]) -> bool:
        value, gradient = tolerance
        return self.value <= value and self.gradient <= gradient and not self.modified


def difference(actual: Tensor, expected: Tensor) -> float:
    """Infinite where the two do not have the same infinities and NaNs."""
    if actual.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0)):
        return math.inf
    if not bool(actual[finite].isfinite().all()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = max(1.0, float(expected[finite].abs().max()))
    return float((actual[finite] - expected[finite]).abs().max()) / scale


def _loss(per_token: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """A sum in which every row has an upstream gradient of its own."""
    return (torch.where(mask, per_token, 0.0) * weight.to(per_token.dtype)).sum()


def run_case(
    case: Case, layout: TokenLayout, make_ops: MakeOps, checks: Iterable[tuple[str, Check]]
) -> dict[str, Error]:
    """Every check on one input. Operations are made once and asked many times, as a training step does."""
    inputs = build_inputs(case, layout.size)
    whole = inputs.student_NV.detach().to(torch.float64, copy=True).requires_grad_()
    dense = View(
        DenseVocab(whole, case.vocab, case.temperature),
        DenseVocab(inputs.teacher_NV.double(), case.vocab, case.temperature),
        inputs,
        slice(None),
        no_reduce,
    )

    width = case.width(layout.size)
    columns = slice(layout.rank * width, min((layout.rank + 1) * width, case.vocab))

    def shard(logits_NV: Tensor) -> Tensor:
        mine = logits_NV[:, columns]
        return torch.cat([mine, mine.new_full((len(mine), width - mine.shape[1]), JUNK)], dim=1)

    mine = shard(inputs.student_NV).requires_grad_()
    before = mine.detach().clone()
    true_layout = TokenLayout(layout.group, layout.scattered)
    parallel = View(
        make_ops(mine, case.vocab, layout, case.temperature),
        ParallelVocab(shard(inputs.teacher_NV), case.vocab, true_layout, case.temperature),
        inputs,
        columns,
        sum_over([layout.group]) if layout.scattered else no_reduce,
    )

    def run(check: Check, view: View, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        per_token = check(view)
        loss = _loss(per_token, view.rows("weight_N"), view.rows("mask_N"))
        (gradient,) = torch.autograd.grad(loss, logits_NV, retain_graph=True)
        return per_token.detach(), gradient

    errors = {}
    for name, check in checks:
        expected_N, whole_grad = run(check, dense, whole)
        actual_n, actual_grad = run(check, parallel, mine)
        expected_grad = torch.zeros(len(before), width, dtype=torch.float64)
        expected_grad[:, : max(columns.stop - columns.start, 0)] = whole_grad[:, columns]
        if case.nan_row is not None and case.nan_row in case.masked:
            # There, NaN and 0 are both right: 0 * NaN. What counts is that no other row sees it.
            actual_grad[case.nan_row] = expected_grad[case.nan_row] = 0.0
        errors[name] = Error(
            value=difference(actual_n, layout.rows(expected_N)),
            gradient=difference(actual_grad, expected_grad),
            modified=not torch.equal(mine.detach().nan_to_num(7.0), before.nan_to_num(7.0)),
        )
    return errors


def applicable(checks: Mapping[str, Check], case: Case) -> Iterator[tuple[str, Check]]:
    for name, check in checks.items():
        if case.impossible_student and name in _INFINITE:
            continue
        yield name, check


def parity(
    cases: Iterable[str],
    make_ops: MakeOps = ParallelVocab,
    layout_type: type[TokenLayout] = TokenLayout,
    checks: Mapping[str, Check] = CHECKS,
) -> dict[tuple[str, str, str], Error]:
    """This rank's errors by (case, replicated | scattered, check), over the default process group."""
    group = dist.group.WORLD
    assert group is not None
    return {
        (case, "scattered" if scattered else "replicated", name): error
        for case in cases
        for scattered in (False, True)
        for name, error in run_case(
            CASES[case], layout_type(group, scattered), make_ops, applicable(checks, CASES[case])
        ).items()
    }


def worst(ranks: Iterable[Mapping[Any, Error]]) -> dict[Any, Error]:
    """The worst of all ranks, entry by entry."""
    merged: dict[Any, list[Error]] = {}
    for errors in ranks:
        for key, error in errors.items():
            merged.setdefault(key, []).append(error)
    return {
        key: Error(max(e.value for e in errors), max(e.gradient for e in errors), any(e.modified for e in errors))
        for key, errors in merged.items()
    }


def tolerance(case: Case, check: str) -> tuple[float, float]:
    """(value, gradient), for rounding only: gates are float32 by design, gradients have the logits' own dtype."""
    if case.dtype == torch.bfloat16:
        return 2e-5, 8e-3
    if case.dtype == torch.float32:
        return 2e-5, 2e-5
    return (1e-6, 1e-6) if check in GATED else (1e-12, 1e-12)


Combine = Callable[[list[tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]], Tensor]
"""(loss sum, gate mass) of each micro-batch, and how to complete a sum over ranks -> this rank's share of the loss."""


def exact_normalisation(parts: list[tuple[Tensor, Tensor]], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """All loss sums over all masses."""
    mass = reduce(torch.stack([mass for _, mass in parts]).sum())
    return torch.stack([loss for loss, _ in parts]).sum() / mass


def step_parity(combine: Combine, scattered: bool) -> Error:
    """A gated optimizer step in two micro-batches, against one dense formula over all of its tokens."""
    group = dist.group.WORLD
    assert group is not None
    layout = TokenLayout(group, scattered)
    reduce = sum_over([group]) if scattered else no_reduce
    gate = Gate()
    micro_batches = [CASES["every_shard"], CASES["some_masked"]]

    def part(view: View) -> tuple[Tensor, Tensor]:
        gated = gate(view.signals(view.student.logprob(view.inputs.sampled_N)))
        loss_n = torch.where(view.rows("mask_N"), OBJECTIVES["sampled_token"](view), 0.0)
        return (gated.weight_n * loss_n).sum(), gated.mass

    dense, shards, columns, references, parts = [], [], [], [], []
    for case in micro_batches:
        inputs = build_inputs(case, layout.size)
        width = case.width(layout.size)
        mine = slice(layout.rank * width, (layout.rank + 1) * width)
        dense.append(inputs.student_NV.clone().requires_grad_())
        shards.append(inputs.student_NV[:, mine].clone().requires_grad_())
        columns.append(mine)
        view = View(
            DenseVocab(dense[-1], case.vocab), DenseVocab(inputs.teacher_NV, case.vocab), inputs, mine, no_reduce
        )
        references.append(part(view))
        view = View(
            ParallelVocab(shards[-1], case.vocab, layout),
            ParallelVocab(inputs.teacher_NV[:, mine], case.vocab, layout),
            inputs,
            mine,
            reduce,
        )
        parts.append(part(view))

    expected = exact_normalisation(references, no_reduce)
    expected_grads = torch.autograd.grad(expected, dense)
    actual = combine(parts, reduce)
    actual_grads = torch.autograd.grad(actual, shards)
    return Error(
        value=difference(reduce(actual.detach().clone()), expected.detach()),
        gradient=max(difference(a, e[:, c]) for a, e, c in zip(actual_grads, expected_grads, columns)),
    )
