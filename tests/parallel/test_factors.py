"""A user's own factors, live and prepared, have the loss and gradient of a dense float64 formula in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bpdg.controllers.factor import Factor, Response, drop, plain, product, select
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.signals import Signals, SumReduce
from tests.parallel.layouts import Case, assert_same_gradients, dense_reference, responses, run_case, write_models
from tests.parallel.spawn import run_ranks

UPDATE = "lsm"
ONE = {"single": Case(), "packed": Case(packed=True)}
TWO = {
    "tp2_sp": Case({"tensor_parallel": 2, "sequence_parallel": True}),
    "packed_cp2": Case({"context_parallel": 2}, packed=True),
    "pp2": Case({"pipeline_parallel": 2}),
    "dp2": Case({"data_parallel": 2}),
}


def kept(response: Response) -> Tensor:
    return torch.arange(len(response.response_ids)) % 3 != 1


def near_the_end(response: Response) -> Tensor:
    return 1.0 / torch.arange(len(response.response_ids), 0, -1).double()


class NearTheEnd:
    """Weighs tokens by what follows them and by the number of all tokens, leaves some out; reads whole responses."""

    def prepare(self, batch: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        total = reduce(torch.tensor([sum(int(r.counts.sum()) for r in batch)], dtype=torch.float64))
        return [product([plain(near_the_end(r) * total), select(kept(r))], r.counts) for r in batch]


class Nothing:
    def prepare(self, batch: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        return [select(torch.zeros(len(r.response_ids), dtype=torch.bool)) for r in batch]


class Infinite:
    def prepare(self, batch: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        return [plain(torch.full((len(r.response_ids),), torch.inf)) for r in batch]


def calm_sequences(signals: Signals) -> Factor:
    """Sequences whose mean drift is positive weigh more; those that drift far are dropped."""
    mean_G, _ = signals.mean(signals.drift_n, signals.sequences)
    mean_n = mean_G[signals.sequences.index_n]
    return product([plain(mean_n.exp()), drop(mean_n.abs() < 3.0)], signals.mask_n)


def others(trajectory: Trajectory, drift: Tensor) -> tuple[Tensor, Tensor]:
    counts, total = trajectory.counts, sum(int(t.counts.sum()) for t in responses())
    mean = drift[counts].mean()
    keep = kept(trajectory).double()
    return near_the_end(trajectory) * total * keep * mean.exp() * (mean.abs() < 3.0), keep


def run_cases(cases: dict[str, Case], models: Path) -> dict[str, dict[str, Any]]:
    def one(case: Case, prepared: Any) -> dict[str, Any]:
        result: dict[str, Any] = run_case(case, models, [UPDATE], 0, [calm_sequences], [prepared])[UPDATE]
        return result

    measured = {name: one(case, NearTheEnd()) for name, case in cases.items()}
    case = list(cases.values())[-1]
    measured["nothing"] = one(case, Nothing())
    with pytest.raises(RuntimeError, match="NaN or infinite: the factors' weights or masses of"):
        one(case, Infinite())
    return measured


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {}
    for size, cases in ((1, ONE), (2, TWO)):
        ranks = run_ranks(run_cases, size, cases, models)
        measured |= {name: [rank[name] for rank in ranks] for name in cases}
        measured[f"nothing on {size}"] = [rank["nothing"] for rank in ranks]
    return measured


@pytest.fixture(scope="module")
def reference(models: Path) -> tuple[float, dict[str, Tensor]]:
    return dense_reference(models / "qwen3", UPDATE, others)


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_factors_are_exact_in_every_layout(
    name: str, results: dict[str, list[dict[str, Any]]], reference: tuple[float, dict[str, Tensor]]
) -> None:
    loss, gradients = reference
    for rank in results[name]:
        assert rank["statistics"]["loss/opd"] == pytest.approx(loss, rel=1e-5)
        assert "weight/empty_updates" not in rank["statistics"]
        assert_same_gradients(rank["gradients"], gradients, tol=2e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_an_update_without_mass_has_no_gradient_and_is_counted(
    size: int, results: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in results[f"nothing on {size}"]:
        assert rank["statistics"]["weight/empty_updates"] == 1.0
        assert rank["statistics"]["loss/opd"] == 0.0
        assert not any(gradient.any() for gradient in rank["gradients"].values())
