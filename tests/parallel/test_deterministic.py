"""training.deterministic through whole runs: no operation that would raise on a GPU, and the same bits twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.integration.miniature import Miniature, make_miniature, metrics, weights
from tests.parallel.spawn import run_ranks
from tests.parallel.test_head_memory import causal_bias

# What torch.use_deterministic_algorithms names as throwing on a CUDA tensor, among what one may meet in a trainer. Some
# of it only in older versions; cumsum, of floats alone.
THROWS = {"cumsum", "put_", "histc", "median", "nanmedian", "kthvalue", "nll_loss_forward", "nll_loss2d_forward"}
LAYOUT = {"tensor_parallel": 2, "sequence_parallel": True}
RUNS: dict[str, dict[str, Any]] = {
    "first": {"deterministic": True, "steps": 2},
    "second": {"deterministic": True, "steps": 2},
    "free": {"deterministic": False, "steps": 1},
}


class Operations(TorchDispatchMode):
    """Names of all operations, and of those that would have raised on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.throw: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        throws = args[0].is_floating_point() if name == "cumsum" else name in THROWS
        if throws or (name == "bincount" and len(args) > 1 and args[1] is not None):
            self.throw.add(str(func))
        return func(*args, **(kwargs or {}))


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What works on a copy in host memory, which does not look different here."""

    def unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return unseen


def whole_runs(miniature: Miniature, folder: Path) -> dict[str, Any]:
    """Each run's operations, whether its updates were in the mode, what it left; and gradients of repeated ids."""
    from megatron_bpdg.training import loop, step

    report: dict[str, Any] = {}
    for name, training in RUNS.items():
        in_mode: list[bool] = []

        def update(self: Any, batches: Any, made: Any = step.Updater.update, in_mode: list[bool] = in_mode) -> Any:
            in_mode.append(
                torch.are_deterministic_algorithms_enabled() and self.policy.unwrapped.config.deterministic_mode
            )
            return made(self, batches)

        cfg = miniature.config(
            folder / name,
            {
                "layout": LAYOUT,
                "objective": {"name": "lsm", "top_k": 8, "append_sampled": True},
                "gate": {"partition": {"name": "newline", "min_size": 2, "max_size": 6}},
                "rollout": {"sampling": {"max_new_tokens": 8, "top_p": 0.9}},
                "training": {"minibatches": 1, **training},
            },
        )
        with (
            mock.patch.object(step.Updater, "update", update),
            mock.patch.object(step, "drift_statistics", on_the_host(step.drift_statistics)),
            mock.patch("megatron_bpdg.models.specs.causal_lower_right", causal_bias),
            Operations() as operations,
        ):
            loop.distill(cfg)
        report[name] = operations.seen, operations.throw, in_mode, torch.are_deterministic_algorithms_enabled()
    report["repeated"] = repeated_ids()
    return report


def repeated_ids() -> dict[str, list[Tensor]]:
    """Gradients of hidden states and weight from ids that nearly all tokens share, twice by each head, in threads."""
    from megatron_bpdg.parallel.head import Head
    from megatron_bpdg.parallel.vocab import TokenLayout
    from megatron_bpdg.training.deterministic import deterministic

    assert dist.group.WORLD is not None
    layout = TokenLayout(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(512, 64, generator=generator)
    weight_VH = torch.randn(48, 64, generator=generator)
    ids_NK = torch.randint(4, (512, 8), generator=generator) + 30 * torch.randint(2, (512, 1), generator=generator)
    scale_NK = torch.randn(512, 8, generator=generator)
    found: dict[str, list[Tensor]] = {}
    torch.set_num_threads(4)
    with deterministic(True):
        for name, kind, dtype in (
            ("chunked", "chunked", torch.float32),
            ("chunked again", "chunked", torch.float32),
            ("materialised", "materialised", torch.float32),
            ("materialised again", "materialised", torch.float32),
            ("exact", "materialised", torch.float64),
        ):
            inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden_NH, weight_VH)]
            ops = Head(kind, 0.05).vocab_ops(*inputs, 90, layout, 0.7, accumulate=False)  # type: ignore[arg-type]
            (ops.gather(ids_NK) * scale_NK).sum().backward()
            found[name] = [tensor.grad for tensor in inputs if tensor.grad is not None]
    torch.set_num_threads(1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(whole_runs, 2, make_miniature(folder / "miniature"), folder)


def test_the_mode_is_on_in_every_update_and_off_after_the_run(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, training in RUNS.items():
            _, _, in_mode, afterwards = rank[name]
            assert in_mode == [training["deterministic"]] * 2 * training["steps"]
            assert not afterwards


def test_no_operation_would_raise_on_a_gpu(ranks: list[dict[str, Any]]) -> None:
    with Operations() as operations:
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.int64).cumsum(0)
    assert operations.throw == {"aten.cumsum.default"}
    for rank in ranks:
        for name in RUNS:
            seen, throw, *_ = rank[name]
            # The eyes were open for sampler, loss, backward and optimizer.
            assert seen >= {"searchsorted", "cumsum", "index_add_", "sort", "topk", "sqrt"}
            assert not throw
            # Its order of summation on a GPU is not fixed; indexing has another backward.
            assert ("embedding_dense_backward" in seen) == (name == "free")


def test_two_runs_are_the_same_to_the_bit(ranks: list[dict[str, Any]], folder: Path) -> None:
    logged = {name: metrics(folder / name) for name in RUNS}
    saved = {name: weights(folder / name / "checkpoints") for name in RUNS}
    assert logged["first"] == logged["second"]
    assert all(torch.equal(tensor, saved["second"][name]) for name, tensor in saved["first"].items())
    for file in ("samples.jsonl", "drift.jsonl"):
        assert (folder / "first" / file).read_text() == (folder / "second" / file).read_text()
    # And, but for rounding, the run that it would have been anyway.
    for record, expected in zip(logged["first"], logged["free"]):
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("head", ["chunked", "materialised"])
def test_repeated_ids_add_up_to_the_same_bits(head: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["repeated"]
        for gradient, again, exact in zip(found[head], found[f"{head} again"], found["exact"], strict=True):
            assert torch.equal(gradient, again)
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-4)
