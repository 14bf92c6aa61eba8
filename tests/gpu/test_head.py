"""The heads on a CUDA device, compiled kernels included: dense values and gradients, the same bits again, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.head import Head, HeadKind
from megatron_bpdg.parallel.vocab import TokenLayout
from megatron_bpdg.parallel.world import world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
KINDS: tuple[HeadKind, ...] = ("materialised", "chunked", "fused")
# No multiples of any block, and padding beyond the vocabulary.
TOKENS, HIDDEN, VOCAB, PADDED, K = 333, 200, 1000, 1024, 33
TEMPERATURE, CHUNK_MB = 0.8, 0.5
# Of the largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids(*shape: int) -> Tensor:
    """Few ids have many entries, as in text."""
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(3))
    return (VOCAB ** uniform.square()).long().sub(1).clamp(max=VOCAB - 1).to(DEVICE)


LOSSES: dict[str, Callable[[VocabOps], Tensor]] = {
    "logprob": lambda ops: ops.logprob(ids(TOKENS))[:, None],
    "gather": lambda ops: ops.gather(ids(TOKENS, K)),
    "tail": lambda ops: ops.gather(ids(TOKENS, K)) - ops.logsumexp()[:, None],
    "entropy": lambda ops: ops.entropy()[:, None],
}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with world(Layout(), seed=0):
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(loss_of: str, dtype: torch.dtype, kind: HeadKind | None) -> tuple[Tensor, Tensor, Tensor]:
    """(values, hidden gradient, weight gradient); without a kind, dense float64 ones of the same rounded inputs."""
    hidden_NH, weight_VH = normal(TOKENS, HIDDEN, seed=1).to(dtype), normal(PADDED, HIDDEN, seed=2).to(dtype) / 8
    if kind is None:
        hidden_NH, weight_VH = hidden_NH.double(), weight_VH.double()
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    if kind is None:
        ops: VocabOps = DenseVocab(hidden_NH @ weight_VH.t(), VOCAB, TEMPERATURE)
    else:
        assert dist.group.WORLD is not None
        head, layout = Head(kind, CHUNK_MB), TokenLayout(dist.group.WORLD)
        ops = head.vocab_ops(hidden_NH, weight_VH, VOCAB, layout, TEMPERATURE, accumulate=False)
    values = LOSSES[loss_of](ops)
    (values * normal(TOKENS, 1, seed=4)).sum().backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is not None
    return values.detach(), hidden_NH.grad, weight_VH.grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_dense_ones(kind: HeadKind, dtype: torch.dtype) -> None:
    worst = {}
    for loss_of in LOSSES:
        found, expected = results(loss_of, dtype, kind), results(loss_of, dtype, None)
        for name, actual, reference in zip(("value", "hidden", "weight"), found, expected):
            worst[f"{loss_of} {name}"] = float((actual - reference).abs().max() / reference.abs().max())
    assert not {name: error for name, error in worst.items() if not error < TOLERANCE[dtype]}


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms_give_the_same_bits_again(kind: HeadKind) -> None:
    with deterministic():
        for loss_of in LOSSES:
            first, second = (results(loss_of, torch.bfloat16, kind) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second)), loss_of


@pytest.mark.parametrize(("kind", "loss_of"), itertools.product(("chunked", "fused"), ("logprob", "gather")))
def test_memory_is_a_fraction_of_the_logits(kind: HeadKind, loss_of: str) -> None:
    tokens, hidden, vocab, chunk_mb = 8192, 256, 131_072, 32.0
    hidden_NH = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randint(vocab, (tokens, 1 if loss_of == "logprob" else 32), device=DEVICE)
    assert dist.group.WORLD is not None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layout = TokenLayout(dist.group.WORLD)
    ops = Head(kind, chunk_mb).vocab_ops(hidden_NH, weight_VH, vocab, layout, 1.0, accumulate=False)
    values = ops.logprob(wanted[:, 0]) if loss_of == "logprob" else ops.gather(wanted) - ops.sweep().lse_N[:, None]
    values.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden_NH.nbytes - weight_VH.nbytes
    # chunked sums the gathered rows' gradient in float32; three chunks; a few tensors of [N, K] and [N, H].
    float32_sum = weight_VH.numel() * 4 if (kind, loss_of) == ("chunked", "gather") else 0
    assert extra < float32_sum + 5 * chunk_mb * 1e6 < tokens * vocab * 2 / 3
