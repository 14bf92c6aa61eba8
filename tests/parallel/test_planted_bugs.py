"""The parity checker catches the bugs that published vocab-parallel losses have had.

Nearly all of them share one signature: the loss is right and only the gradient is wrong. Each is planted here in a few
lines; the checker that passes the real operations must fail on it, through the gradient where the loss says nothing.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import DenseVocab
from megatron_bpdg.parallel import vocab
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout
from tests.parallel.parity import (
    CHECKS,
    Check,
    Combine,
    Error,
    MakeOps,
    View,
    exact_normalisation,
    parity,
    step_parity,
    tolerance,
    worst,
)
from tests.parallel.parity_inputs import CASES
from tests.parallel.spawn import run_ranks

WORLD_SIZE = 2
USED = ("anywhere", "edges", "every_shard", "padded", "some_masked")


class PlainAllReduce(ParallelVocab):
    """An in-place all-reduce inside the graph: autograd believes that the total depends on this rank alone."""

    def log_softmax(self) -> Tensor:
        shift_N1 = self._lse_N[:, None]
        total_N = (self.logits_NV - shift_N1).exp().sum(1)
        dist.all_reduce(total_N, group=self.layout.group)
        return self.logits_NV - shift_N1 - total_N.log()[:, None]


class _LocalRowSum(vocab._LogSoftmax):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (log_p_NV,) = ctx.saved_tensors
        return grads[0] - log_p_NV.exp() * grads[0].sum(1, keepdim=True), None, None


class LocalRowSum(ParallelVocab):
    """The backward of log-softmax sums this rank's columns only."""

    def log_softmax(self) -> Tensor:
        return _LocalRowSum.apply(self.logits_NV, self._lse_N, self.layout)


def _owner_only(
    grad_N: Tensor, logits_NV: Tensor, lse_N: Tensor, column_N1: Tensor, gradient: Any = vocab._logprob_gradient
) -> tuple[Tensor]:
    (grad_NV,) = gradient(grad_N, logits_NV, lse_N, column_N1)
    return (grad_NV * ((column_N1 >= 0) & (column_N1 < logits_NV.shape[1])),)


class OwnerOnly(ParallelVocab):
    """Ranks that do not hold the sampled token contribute no gradient, though their softmax has one."""

    def logprob(self, ids_N: Tensor) -> Tensor:
        with mock.patch.object(vocab, "_logprob_gradient", _owner_only):
            return super().logprob(ids_N)


class _SumOverRanks(torch.autograd.Function):
    """What autograd-aware all-reduces do: the gradient is all-reduced as well."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class DifferentiableAllReduce(ParallelVocab):
    """Right for a loss of which each rank holds a part; TP times too large for one that every rank holds whole."""

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        return self.rows(_SumOverRanks.apply(x_NV.sum(1), self.layout.group))


class SummedGradients(TokenLayout):
    """A gather whose backward sums over the ranks: every gradient TP times too large."""

    def expand(self, rows: Tensor) -> Tensor:
        return self.sum_(super().expand(rows).clone())


class _Overwriting(vocab._Gather):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (column_NK,) = ctx.saved_tensors
        grad_NK = ctx.layout.expand(grads[0])
        grad_NV = grad_NK.new_zeros(ctx.shape)
        here_NK = (column_NK >= 0) & (column_NK < grad_NV.shape[1])
        grad_NV.scatter_(1, torch.where(here_NK, column_NK, 0), torch.where(here_NK, grad_NK, 0.0))
        return grad_NV, None, None


class Overwriting(ParallelVocab):
    """Ids of other shards are parked at column 0 and written, not added: that column's own gradient is lost."""

    def gather(self, ids_NK: Tensor) -> Tensor:
        return _Overwriting.apply(self.logits_NV, ids_NK - self.ids.start, self.layout)


class UnmaskedPadding(ParallelVocab):
    """Padding columns take part in the softmax."""

    def __init__(self, logits_NV: Tensor, vocab_size: int, layout: TokenLayout, temperature: float = 1.0) -> None:
        super().__init__(logits_NV, logits_NV.shape[1] * layout.size, layout, temperature)


class OverwrittenLogits(ParallelVocab):
    """The maximum is subtracted in place; float32 logits are not copied first."""

    def __init__(self, logits_NV: Tensor, vocab_size: int, layout: TokenLayout, temperature: float = 1.0) -> None:
        super().__init__(logits_NV, vocab_size, layout, temperature)
        max_N1 = self.logits_NV.detach().amax(1, keepdim=True)
        dist.all_reduce(max_N1, op=dist.ReduceOp.MAX, group=layout.group)
        logits_NV.detach().sub_(max_N1)


def forgotten_mass(view: View) -> Tensor:
    """The gradient `P - Q` of a teacher whose support holds all its mass, instead of `mass * P - Q`."""
    loss_n = CHECKS["unnormalised_topk_kl"](view)
    if isinstance(view.student, DenseVocab):
        return loss_n
    teacher_logprobs_nK = view.signal.support_logprobs_nK
    assert teacher_logprobs_nK is not None
    logits_nK = view.student.gather(view.inputs.support_NK)
    wrong_n = view.student.logsumexp() - (teacher_logprobs_nK.exp() * logits_nK).sum(-1)
    return loss_n.detach() + wrong_n - wrong_n.detach()


def per_micro_batch(parts: list[tuple[Tensor, Tensor]], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Each micro-batch is normalised by its own mass, and the quotients are averaged."""
    return torch.stack([loss / reduce(mass.clone()) for loss, mass in parts]).mean()


def integer_mass(parts: list[tuple[Tensor, Tensor]], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The denominator is accumulated as an integer, as a trainer that counts tokens does."""
    return exact_normalisation([(loss, mass.long().double()) for loss, mass in parts], reduce)


@dataclass(frozen=True)
class Bug:
    """A planted bug, and what the checker must say of it.

    Attributes:
        caught: checks whose gradient must be wrong.
        layouts: where.
        loss_is_right: every value agrees all the same.
    """

    caught: tuple[str, ...]
    make_ops: MakeOps = ParallelVocab
    layout_type: type[TokenLayout] = TokenLayout
    checks: dict[str, Check] | None = None
    layouts: tuple[str, ...] = ("replicated", "scattered")
    loss_is_right: bool = True


# With unmasked padding, rows of the whole vocabulary do not even have the right width.
NARROW = {name: CHECKS[name] for name in ("logsumexp", "logprob", "entropy", "sampled_token", "lsm", "lsm_tail")}
FULL_VOCABULARY = ("log_softmax", "forward_kl", "reverse_kl", "jsd")
BUGS: dict[str, Bug] = {
    "plain_all_reduce": Bug(FULL_VOCABULARY, PlainAllReduce),
    "local_row_sum": Bug(FULL_VOCABULARY, LocalRowSum),
    "owner_only": Bug(("logprob", "sampled_token", "sampled_token_online", "gated_sampled_token_global"), OwnerOnly),
    "differentiable_all_reduce": Bug(FULL_VOCABULARY, DifferentiableAllReduce, layouts=("replicated",)),
    "summed_gradients": Bug(tuple(CHECKS), layout_type=SummedGradients),
    "overwriting": Bug(("gather", "lsm", "lsm_tail", "lsm_forward", "lsm_jsd", "gated_lsm_global"), Overwriting),
    "unmasked_padding": Bug(
        ("logsumexp", "logprob", "entropy", "sampled_token", "lsm_tail"),
        UnmaskedPadding,
        checks=NARROW,
        loss_is_right=False,
    ),
    "forgotten_mass": Bug(("unnormalised_topk_kl",), checks={"unnormalised_topk_kl": forgotten_mass}),
}
STEPS: dict[str, Combine] = {
    "exact": exact_normalisation,
    "per_micro_batch": per_micro_batch,
    "integer_mass": integer_mass,
}


def warned() -> str:
    """What the ranks' strict warning filter says of the in-place all-reduce, before any number is compared."""
    try:
        parity(["anywhere"], PlainAllReduce, checks={"reverse_kl": CHECKS["reverse_kl"]})
    except (UserWarning, RuntimeError) as error:
        return str(error)
    return ""


def on_ranks() -> dict[str, Any]:
    reports: dict[str, Any] = {"sound": parity(USED), "warned": warned()}
    with warnings.catch_warnings():
        # To see that the numbers catch it too.
        warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
        for name, bug in BUGS.items():
            reports[name] = parity(USED, bug.make_ops, bug.layout_type, bug.checks or CHECKS)
    reports["overwritten_logits"] = parity(USED, OverwrittenLogits, checks={"entropy": CHECKS["entropy"]})
    reports["steps"] = {
        (name, scattered): step_parity(combine, scattered)
        for name, combine in STEPS.items()
        for scattered in (False, True)
    }
    return reports


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, WORLD_SIZE)


def failures(errors: dict[tuple[str, str, str], Error]) -> dict[tuple[str, str, str], Error]:
    return {key: error for key, error in errors.items() if not error.within(tolerance(CASES[key[0]], key[2]))}


def test_the_real_operations_pass(reports: list[dict[str, Any]]) -> None:
    errors = worst(report["sound"] for report in reports)
    assert len(errors) == len(USED) * 2 * len(CHECKS)
    assert not failures(errors)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, reports: list[dict[str, Any]]) -> None:
    bug = BUGS[name]
    errors = worst(report[name] for report in reports)
    found = failures(errors)
    for check, layout in itertools.product(bug.caught, bug.layouts):
        caught = [error for (_, where, key), error in found.items() if where == layout and key == check]
        assert caught, f"{check} does not notice, {layout}"
        # Not a matter of tolerances: the gradient is off by a good part of itself.
        assert max(error.gradient for error in caught) > 0.01
    if bug.loss_is_right:
        assert all(error.value <= tolerance(CASES[key[0]], key[2])[0] for key, error in errors.items())


def test_summed_gradients_are_exactly_too_large(reports: list[dict[str, Any]]) -> None:
    """TP2 doubles the gradient: its error is the reference itself."""
    errors = worst(report["summed_gradients"] for report in reports)
    assert errors["edges", "replicated", "logsumexp"].value < 1e-12
    assert errors["edges", "replicated", "gather"].gradient == pytest.approx(1.0)


def test_a_differentiable_all_reduce_is_right_for_scattered_rows(reports: list[dict[str, Any]]) -> None:
    """There, each row's loss lives on one rank and its gradients must be summed: both layouts need the tests."""
    errors = worst(report["differentiable_all_reduce"] for report in reports)
    assert not {key for key in failures(errors) if key[1] == "scattered"}


def test_modified_logits_are_noticed_although_value_and_gradient_are_right(reports: list[dict[str, Any]]) -> None:
    errors = worst(report["overwritten_logits"] for report in reports)
    assert len(failures(errors)) == len(errors)
    assert all(error.modified and max(error.value, error.gradient) < 1e-12 for error in errors.values())


def test_the_in_place_all_reduce_is_also_an_error_by_its_warning(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "autograd kernel was not registered" in report["warned"]


@pytest.mark.parametrize("scattered", [False, True])
def test_wrong_normalisations_of_a_step_are_caught(scattered: bool, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        steps = report["steps"]
        assert steps["exact", scattered].within((1e-6, 1e-6))
        for wrong in ("per_micro_batch", "integer_mass"):
            assert steps[wrong, scattered].value > 1e-3
            assert steps[wrong, scattered].gradient > 1e-3
