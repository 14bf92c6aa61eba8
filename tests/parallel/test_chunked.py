"""The head without logits at 1, 2 and 4 ranks: dense values and gradients, one sweep for everything, exact top-K."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel import chunked, sparse
from megatron_bpdg.parallel.chunked import ChunkedVocab
from megatron_bpdg.parallel.vocab import TokenLayout
from tests.parallel.parity import CHECKS, Error, MakeOps, applicable, parity, tolerance, worst
from tests.parallel.parity_inputs import CASES
from tests.parallel.spawn import run_ranks
from tests.parallel.test_vocab import LAYOUTS, WORLD_SIZES, count_collectives, layouts, shard_of, topk_inputs

# Two columns of 8 rows, and a row or two of hidden states.
CHUNK_MB = 64e-6
WHOLE = {name for name in CHECKS if name.removeprefix("gated_").startswith(("forward_kl", "reverse_kl", "jsd"))}
PARITY_CHECKS = {name: check for name, check in CHECKS.items() if name not in WHOLE | {"log_softmax"}}
# Through a matrix product, infinite and NaN logits of one token are those of all tokens.
PARITY_CASES = [
    name
    for name, case in CASES.items()
    if case.nan_row is None and not case.impossible_both and not case.impossible_student
]


def of_logits(make: type[ChunkedVocab] = ChunkedVocab, keep_mb: float = 0.0) -> MakeOps:
    """Operations of a head whose weight is the transposed logits, so that its gradient is theirs, exactly."""

    def make_ops(logits_NV: Tensor, vocab_size: int, layout: TokenLayout, temperature: float = 1.0) -> VocabOps:
        hidden_NH = torch.eye(len(logits_NV), dtype=logits_NV.dtype)
        return make(hidden_NH, logits_NV.t(), vocab_size, layout, temperature, chunk_mb=CHUNK_MB, keep_mb=keep_mb)

    return make_ops


class OwnerOnly(ChunkedVocab):
    """Ranks that do not hold the sampled token contribute no gradient, though their softmax has one."""

    def logits_gradient(self, logits_Nv: Tensor, start: int, term: chunked.Term, grad_N: Tensor) -> Tensor:
        grad_Nv = super().logits_gradient(logits_Nv, start, term, grad_N)
        if term.column_N is None:
            return grad_Nv
        return grad_Nv * ((term.column_N >= 0) & (term.column_N < len(self.ids)))[:, None]


class OtherChunks(ChunkedVocab):
    """Ids of other chunks are parked at the chunk's first column with their gradient."""

    def logits_gradient(self, logits_Nv: Tensor, start: int, term: chunked.Term, grad_N: Tensor) -> Tensor:
        if term.column_N is not None:
            inside = (term.column_N >= start) & (term.column_N < start + logits_Nv.shape[1])
            term = chunked.Term(term.lse_N, torch.where(inside, term.column_N, start))
        return super().logits_gradient(logits_Nv, start, term, grad_N)


class UnscaledParts(ChunkedVocab):
    """The sums of chunks are added up although each refers to its own maximum."""

    def _combined(self, max_CN: Tensor, sum_CN: Tensor, shifted_CN: Tensor) -> tuple[Tensor, Tensor]:
        return super()._combined(max_CN.amax(0).expand_as(max_CN), sum_CN, shifted_CN)


class Overwriting(ChunkedVocab):
    """Repeated ids overwrite each other's gradient."""

    def gather(self, ids_NK: Tensor) -> Tensor:
        def put(self: Any, index_E: Tensor, rows_EH: Tensor) -> None:
            self.total_VH[index_E] = rows_EH

        logits_nK = super().gather(ids_NK)
        logits_nK.register_hook(lambda _: mock.patch.object(sparse.WeightGradient, "add_rows", put).start() and None)
        return logits_nK


# Name -> (operations, checks whose gradient must be wrong, whether the value is right all the same).
BUGS: dict[str, tuple[type[ChunkedVocab], tuple[str, ...], bool]] = {
    "owner_only": (OwnerOnly, ("logprob", "sampled_token"), True),
    "other_chunks": (OtherChunks, ("logprob", "sampled_token"), True),
    "unscaled_parts": (UnscaledParts, ("logsumexp", "logprob", "entropy"), False),
    "overwriting": (Overwriting, ("gather", "lsm"), True),
}


def topk_agrees() -> dict[str, bool]:
    """The streamed top-K against the dense one, ties and all; infinite logits cannot come out of a product."""
    agrees = {}
    for name, logits_NV in topk_inputs().items():
        if not logits_NV.isfinite().all():
            continue
        for layout, k in itertools.product(layouts(), (1, 3, 4, 11)):
            actual = of_logits()(shard_of(logits_NV, layout), 11, layout, 1.0).topk(k)
            expected = DenseVocab(logits_NV, 11).topk(k)
            same = all(torch.equal(a, layout.rows(e)) for a, e in zip(actual, expected))
            agrees[f"{name} k={k} scattered={layout.scattered}"] = same
    return agrees


def step_operations(ops: VocabOps) -> Tensor:
    """What a step asks for."""
    ids_N = torch.tensor([0, 9, 15, 3])
    logprob_n = ops.logprob(ids_N)
    with torch.no_grad():
        ops.entropy()
        ops.logsumexp()
        ops.gather(ids_N[:, None])
    return logprob_n


def counts() -> dict[str, Any]:
    """Collectives by operation, and columns of logits that the forward and the backward of a step make."""
    (layout, _), size = layouts(), dist.get_world_size()
    hidden_NH, weight_VH = torch.randn(4, 5, requires_grad=True), torch.randn(16 // size, 5, requires_grad=True)
    columns: list[int] = []
    product = ChunkedVocab.product

    def counted(self: ChunkedVocab, start: int, stop: int) -> Tensor:
        columns.append(stop - start)
        return product(self, start, stop)

    found: dict[str, Any] = {}
    # Chunks of three columns; room for none of them, for two and a half, and for all.
    for keep_mb in (0.0, 2.5 * 48e-6, 1.0):
        columns.clear()
        with mock.patch.object(ChunkedVocab, "product", counted):
            ops = ChunkedVocab(hidden_NH, weight_VH, 16, layout, chunk_mb=48e-6, keep_mb=keep_mb)
            result = step_operations(ops)
            swept = sum(columns)
            result.sum().backward(retain_graph=True)
            backward = sum(columns) - swept
            # What was kept is gone.
            result.sum().backward()
        assert max(columns) == 3
        found[f"columns, {keep_mb}"] = swept, backward, sum(columns) - swept - backward
    ids_N, ids_NK = torch.tensor([0, 9, 15, 3]), torch.tensor([[1, 8, 1]]).expand(4, -1)
    runs: dict[str, Callable[[VocabOps], Tensor]] = {
        "logsumexp": lambda ops: ops.logsumexp(),
        "logprob": lambda ops: ops.logprob(ids_N),
        "gather": lambda ops: ops.gather(ids_NK),
        "entropy": lambda ops: ops.entropy(),
    }
    for layout, (name, run) in itertools.product(layouts(), runs.items()):
        ops = ChunkedVocab(hidden_NH, weight_VH, 16, layout)
        found["scattered" if layout.scattered else "replicated", name] = count_collectives(run, ops)
    return found


def refusals() -> list[str]:
    replicated, scattered = layouts()
    hidden_NH, weight_VH, size = torch.zeros(3, 2), torch.zeros(4, 2), replicated.size
    ops = ChunkedVocab(hidden_NH, weight_VH, 4 * size - 1, replicated)
    attempts: list[Callable[[], Any]] = [
        lambda: ChunkedVocab(hidden_NH, weight_VH, 4 * size + 1, replicated),
        lambda: ops.gather(torch.full((3, 1), 4 * size - 1)),
        lambda: ops.logprob(torch.full((3,), -1)),
        lambda: ops.topk(4 * size),
        lambda: ops.log_softmax(),
        lambda: ops.vocab_sum(torch.zeros(3, 4)),
        lambda: ChunkedVocab(hidden_NH, weight_VH, 4 * size, scattered),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def main_gradients(make: type[ChunkedVocab] = ChunkedVocab) -> dict[str, float]:
    """Largest differences between the main gradient after two micro-batches and autograd's own sum."""
    layout = layouts()[0]
    ids_NK = torch.tensor([[1, 2, 1], [0, 6, 2], [4, 4, 4]])
    losses: dict[str, Callable[[VocabOps], Tensor]] = {
        "logprob": lambda ops: ops.logprob(ids_NK[:, 0]).square().sum(),
        "gather": lambda ops: ops.gather(ids_NK).square().sum(),
        "tail": lambda ops: (ops.gather(ids_NK) - ops.logsumexp()[:, None]).square().sum(),
    }
    report = {}
    for (name, loss), shared in itertools.product(losses.items(), (False, True)):
        generator = torch.Generator().manual_seed(3)
        states = [torch.randn(3, 5, generator=generator) for _ in range(2)]
        weight_VH = torch.randn(8, 5, generator=generator).requires_grad_()
        for hidden_NH in states:
            loss(make(hidden_NH, weight_VH, 7 * layout.size, layout, chunk_mb=CHUNK_MB)).backward()
        expected_VH, weight_VH.grad = weight_VH.grad, None
        assert expected_VH is not None
        hook = SimpleNamespace(main_grad=torch.zeros(8, 5), grad_added_to_main_grad=False, zero_out_wgrad=shared)
        vars(weight_VH).update(vars(hook))
        for hidden_NH in states:
            weight_VH.grad = None
            loss(make(hidden_NH, weight_VH, 7 * layout.size, layout, chunk_mb=CHUNK_MB, accumulate=True)).backward()
            assert weight_VH.grad_added_to_main_grad
            if shared:  # the data-parallel hook adds this to the main gradient, for the embeddings' sake
                assert weight_VH.grad is not None
                assert not weight_VH.grad.any()
        report[f"{name} shared={shared}"] = float((weight_VH.main_grad - expected_VH).abs().max())
    return report


def on_ranks() -> dict[str, Any]:
    report: dict[str, Any] = {
        "parity": parity(PARITY_CASES, of_logits(), checks=PARITY_CHECKS),
        "kept": parity(PARITY_CASES, of_logits(keep_mb=1.5 * CHUNK_MB), checks=PARITY_CHECKS),
        "topk": topk_agrees(),
        "counts": counts(),
        "refusals": refusals(),
        "main_gradients": main_gradients() if dist.get_world_size() == 1 else {},
    }
    if dist.get_world_size() == 2:
        for name, (make, caught, _) in BUGS.items():
            checks = {check: CHECKS[check] for check in caught}
            report[name] = parity(["repeats", "every_shard", "anywhere"], of_logits(make), checks=checks)
            mock.patch.stopall()
    return report


_cache: dict[int, list[dict[str, Any]]] = {}


def results(world_size: int) -> list[dict[str, Any]]:
    if world_size not in _cache:
        _cache[world_size] = run_ranks(on_ranks, world_size)
    return _cache[world_size]


def rounding(case: str, check: str) -> tuple[float, float]:
    value, gradient = tolerance(CASES[case], check)
    # The gradients of the K logits and of the log-sum-exp are rounded to bfloat16 before autograd adds them.
    two_terms = "tail" in check or check == "unnormalised_topk_kl"
    return value, 2.0 * gradient if CASES[case].dtype == torch.bfloat16 and two_terms else gradient


@pytest.mark.parametrize("case", PARITY_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", ["parity", "kept"])
def test_values_and_gradients_are_the_dense_ones(kind: str, world_size: int, layout: str, case: str) -> None:
    errors: dict[Any, Error] = worst(rank[kind] for rank in results(world_size))
    here = {name: errors[case, layout, name] for name, _ in applicable(PARITY_CHECKS, CASES[case])}
    assert not {name: error for name, error in here.items() if not error.within(rounding(case, name))}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    _, caught, value_is_right = BUGS[name]
    errors = worst(rank[name] for rank in results(2))
    for check in caught:
        assert max(error.gradient for (_, _, key), error in errors.items() if key == check) > 0.01
    if value_is_right:
        assert all(error.value <= tolerance(CASES[key[0]], key[2])[0] for key, error in errors.items())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_streamed_topk_is_the_dense_one(world_size: int) -> None:
    for rank in results(world_size):
        assert len(rank["topk"]) == 40
        assert not [name for name, same in rank["topk"].items() if not same]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_columns_are_made_once_in_the_forward_and_again_in_the_backward_unless_kept(world_size: int) -> None:
    columns = 16 // world_size
    for rank in results(world_size):
        found = [value for name, value in rank["counts"].items() if "columns" in str(name)]
        kept = min(6, columns)
        assert found == [(columns,) * 3, (columns, columns - kept, columns), (columns, 0, columns)]


def test_collectives_are_those_of_the_docstring() -> None:
    reduce, scatter, gather = ["all_reduce"], ["reduce_scatter"], ["all_gather"]
    expected = {
        ("replicated", "logsumexp"): (reduce * 2, []),
        ("replicated", "logprob"): (reduce * 3, []),
        ("replicated", "gather"): (reduce, []),
        ("replicated", "entropy"): (reduce * 2, []),
        ("scattered", "logsumexp"): (reduce * 2, gather),
        ("scattered", "logprob"): (reduce * 2 + scatter, gather),
        ("scattered", "gather"): (scatter, gather),
        ("scattered", "entropy"): (reduce * 2, gather),
    }
    for rank in results(2):
        assert {key: rank["counts"][key] for key in expected} == expected


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bad_input_is_refused_on_every_rank(world_size: int) -> None:
    expected = [
        f"{world_size} shards of 4 columns cannot hold a vocabulary of {4 * world_size + 1}",
        f"do not fit a vocabulary of {4 * world_size - 1}",
        "token ids from -1 to -1",
        f"top_k must be between 1 and the vocabulary size {4 * world_size - 1}",
        "set training.head to materialised or auto",
        "set training.head to materialised or auto",
        f"3 tokens cannot be scattered over {world_size} ranks" if world_size > 1 else "",
    ]
    for rank in results(world_size):
        assert all(part in message for message, part in zip(rank["refusals"], expected, strict=True))


def test_the_main_gradient_gets_what_autograd_would_sum() -> None:
    report = results(1)[0]["main_gradients"]
    assert len(report) == 6
    assert not {name: error for name, error in report.items() if not error < 1e-5}
