"""Vocab-parallel operations and objectives at 1, 2 and 4 ranks: dense values, dense gradients, promised collectives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    Error,
    applicable,
    exact_normalisation,
    parity,
    step_parity,
    tolerance,
    worst,
)
from tests.parallel.parity_inputs import CASES, JUNK
from tests.parallel.spawn import run_ranks

WORLD_SIZES = (1, 2, 4)
LAYOUTS = ("replicated", "scattered")


def layouts() -> list[TokenLayout]:
    group = dist.group.WORLD
    assert group is not None
    return [TokenLayout(group, scattered) for scattered in (False, True)]


def shard_of(logits_NV: Tensor, layout: TokenLayout) -> Tensor:
    """This rank's columns of whole logits, with padding that would win any argmax."""
    width = -(-logits_NV.shape[1] // layout.size)
    padding = logits_NV.new_full((len(logits_NV), width * layout.size - logits_NV.shape[1]), JUNK)
    return torch.cat([logits_NV, padding], dim=1).chunk(layout.size, dim=1)[layout.rank].clone()


def topk_inputs() -> dict[str, Tensor]:
    """Logits of 8 rows and 11 ids, with ties within and across shards, and impossible ones."""
    generator = torch.Generator().manual_seed(0)
    ties_NV = torch.randint(-2, 3, (8, 11), generator=generator).double()
    impossible_NV = torch.where(ties_NV == 1, -math.inf, ties_NV)
    # Equal in float32, in which supports are compared, though not in float64.
    close_NV = 1.0 + 1e-12 * torch.randn(8, 11, generator=generator, dtype=torch.float64)
    negative_zero_NV = torch.where(ties_NV > 0, -0.0, 0.0)
    return {
        "random": torch.randn(8, 11, generator=generator, dtype=torch.float64),
        "ties": ties_NV,
        "impossible": impossible_NV,
        "nothing_possible": torch.full((8, 11), -math.inf, dtype=torch.float64),
        "equal_in_float32": close_NV,
        "signed_zeros": negative_zero_NV,
        "bfloat16": torch.randn(8, 11, generator=generator).bfloat16(),
    }


def topk_agrees() -> dict[str, bool]:
    agrees = {}
    for name, logits_NV in topk_inputs().items():
        for layout, k in itertools.product(layouts(), (1, 3, 4, 11)):
            actual = ParallelVocab(shard_of(logits_NV, layout), 11, layout).topk(k)
            expected = DenseVocab(logits_NV, 11).topk(k)
            same = all(torch.equal(a, layout.rows(e)) for a, e in zip(actual, expected))
            agrees[f"{name} k={k} scattered={layout.scattered}"] = same
    return agrees


def count_collectives(run: Callable[[Any], Tensor], ops: Any) -> tuple[list[str], list[str]]:
    """Names of the collectives of a forward and of its backward."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    with (
        mock.patch.object(dist, "all_reduce", counted("all_reduce", dist.all_reduce)),
        mock.patch.object(dist, "all_gather", counted("all_gather", dist.all_gather)),
        mock.patch.object(vocab, "_reduce_scatter", counted("reduce_scatter", vocab._reduce_scatter)),
        mock.patch.object(vocab, "_all_gather", counted("all_gather", vocab._all_gather)),
    ):
        result = run(ops)
        forward = list(calls)
        calls.clear()
        if result.requires_grad:
            result.sum().backward()
        return forward, list(calls)


def collectives() -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    ids_N, ids_NK = torch.tensor([0, 9, 15, 3]), torch.tensor([[1, 8, 1]]).expand(4, -1)
    runs: dict[str, Callable[[ParallelVocab], Tensor]] = {
        "first logsumexp": lambda ops: ops.logsumexp(),
        "logsumexp": lambda ops: ops.logsumexp(),
        "logprob": lambda ops: ops.logprob(ids_N),
        "gather": lambda ops: ops.gather(ids_NK),
        "entropy": lambda ops: ops.entropy(),
        "log_softmax": lambda ops: ops.log_softmax(),
        "vocab_sum": lambda ops: ops.vocab_sum(ops.logits_NV),
        "topk": lambda ops: ops.topk(3)[0],
    }
    # These never look at the log-sum-exp; for the others, its two collectives are paid beforehand.
    cold = ("first logsumexp", "gather", "vocab_sum", "topk")
    counts = {}
    for layout, (name, run) in itertools.product(layouts(), runs.items()):
        logits_NV = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        ops = ParallelVocab(logits_NV, 16, layout)
        if name not in cold:
            ops.logsumexp()
        counts["scattered" if layout.scattered else "replicated", name] = count_collectives(run, ops)
    return counts


def refusals() -> list[str]:
    """Messages of the errors that bad input gets, on this rank."""
    replicated, scattered = layouts()
    logits_NV = torch.zeros(3, 4)
    size = replicated.size
    attempts: list[Callable[[], Any]] = [
        lambda: ParallelVocab(logits_NV, 4 * size + 1, replicated),
        lambda: ParallelVocab(logits_NV, 4 * size, replicated).gather(torch.full((3, 1), 4 * size)),
        lambda: ParallelVocab(logits_NV, 4 * size, replicated).logprob(torch.full((3,), -1)),
        # A padding column exists on the last shard, but is no token.
        lambda: ParallelVocab(logits_NV, 4 * size - 1, replicated).logprob(torch.full((3,), 4 * size - 1)),
        lambda: ParallelVocab(logits_NV, 4 * size, replicated).topk(4 * size + 1),
        lambda: ParallelVocab(logits_NV, 4 * size, replicated).topk(0),
        lambda: ParallelVocab(logits_NV, 4 * size, scattered),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def gradchecks() -> dict[str, bool]:
    """The hand-written backwards against finite differences (meaningful on one rank, where nothing is shared)."""
    ids_N, ids_NK = torch.tensor([0, 3, 6]), torch.tensor([[1, 5, 1], [0, 6, 2], [4, 4, 4]])
    functions: dict[str, Callable[[ParallelVocab], Tensor]] = {
        "logsumexp": lambda ops: ops.logsumexp(),
        "logprob": lambda ops: ops.logprob(ids_N),
        "gather": lambda ops: ops.gather(ids_NK),
        "entropy": lambda ops: ops.entropy(),
        "log_softmax": lambda ops: ops.log_softmax(),
        "vocab_sum": lambda ops: ops.vocab_sum(ops.logits_NV.square()),
    }
    logits_NV = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    return {
        f"{name} scattered={layout.scattered}": torch.autograd.gradcheck(
            lambda z, f=function, where=layout: f(ParallelVocab(z, 7, where, temperature=0.8)),
            (logits_NV,),
        )
        for name, function in functions.items()
        for layout in layouts()
    }


def on_ranks() -> dict[str, Any]:
    """Everything that needs ranks, in one go: starting them costs more than running."""
    return {
        "parity": parity(CASES),
        "topk": topk_agrees(),
        "refusals": refusals(),
        "step": {layout: step_parity(exact_normalisation, layout == "scattered") for layout in LAYOUTS},
        "collectives": collectives() if dist.get_world_size() == 2 else {},
        "gradchecks": gradchecks() if dist.get_world_size() == 1 else {},
    }


_cache: dict[int, list[dict[str, Any]]] = {}


def results(world_size: int) -> list[dict[str, Any]]:
    if world_size not in _cache:
        _cache[world_size] = run_ranks(on_ranks, world_size)
    return _cache[world_size]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_values_and_gradients_are_the_dense_ones(world_size: int, layout: str, case: str) -> None:
    errors: dict[Any, Error] = worst(rank["parity"] for rank in results(world_size))
    names = [name for name, _ in applicable(CHECKS, CASES[case])]
    here = {name: errors[case, layout, name] for name in names}
    bad = {name: error for name, error in here.items() if not error.within(tolerance(CASES[case], name))}
    assert not bad


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_empty_mask_gives_exactly_nothing(world_size: int) -> None:
    errors = worst(rank["parity"] for rank in results(world_size))
    assert {error.gradient for (case, _, _), error in errors.items() if case == "all_masked"} == {0.0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_in_micro_batches_is_one_dense_formula(world_size: int, layout: str) -> None:
    for rank in results(world_size):
        assert rank["step"][layout].within((1e-6, 1e-6))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_topk_is_the_dense_one(world_size: int) -> None:
    for rank in results(world_size):
        assert not [name for name, same in rank["topk"].items() if not same]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bad_input_is_refused_on_every_rank(world_size: int) -> None:
    for rank in results(world_size):
        *messages, not_divisible = rank["refusals"]
        for message, expected in zip(
            messages,
            [
                f"{world_size} shards of 4 columns cannot hold a vocabulary of {4 * world_size + 1}",
                f"do not fit a vocabulary of {4 * world_size}",
                "token ids from -1 to -1",
                f"do not fit a vocabulary of {4 * world_size - 1}",
                f"top_k must be between 1 and the vocabulary size {4 * world_size}",
                "got 0",
            ],
            strict=True,
        ):
            assert expected in message
        if world_size > 1:
            assert not_divisible == (
                f"3 tokens cannot be scattered over {world_size} ranks: pad to a multiple of {world_size}"
            )


def test_collectives_are_those_of_the_docstring() -> None:
    reduce, scatter, gather = ["all_reduce"], ["reduce_scatter"], ["all_gather"]
    expected = {
        ("replicated", "first logsumexp"): (reduce * 2, []),
        ("replicated", "logsumexp"): ([], []),
        ("replicated", "logprob"): (reduce, []),
        ("replicated", "gather"): (reduce, []),
        ("replicated", "entropy"): (reduce, []),
        ("replicated", "log_softmax"): ([], reduce),
        ("replicated", "vocab_sum"): (reduce, []),
        ("replicated", "topk"): (gather * 2, []),
        ("scattered", "first logsumexp"): (reduce * 2, gather),
        ("scattered", "logsumexp"): ([], gather),
        ("scattered", "logprob"): (scatter, gather),
        ("scattered", "gather"): (scatter, gather),
        ("scattered", "entropy"): (reduce, gather),
        ("scattered", "log_softmax"): ([], reduce),
        ("scattered", "vocab_sum"): (scatter, gather),
        ("scattered", "topk"): (gather * 2, []),
    }
    for rank in results(2):
        assert rank["collectives"] == expected


def test_backwards_against_finite_differences() -> None:
    checks = results(1)[0]["gradchecks"]
    assert len(checks) == 12
    assert all(checks.values())
