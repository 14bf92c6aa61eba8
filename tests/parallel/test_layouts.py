"""Every layout gives the loss and the gradients of one process, and one process those of a dense HF reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.layouts import (
    OBJECTIVES,
    Case,
    assert_same_gradients,
    assert_same_result,
    dense_reference,
    run_cases,
    write_models,
)
from tests.parallel.spawn import run_ranks

TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
CP2 = {"context_parallel": 2}
DP2_DISTRIBUTED = {"data_parallel": 2, "distributed_optimizer": True}

# What every other case of the same kind must equal.
SINGLE = {"single": Case(), "single_experts": Case(kind="qwen3_moe")}
CASES = {
    "packed": Case(packed=True),
    "packed_experts": Case(packed=True, kind="qwen3_moe"),
    "materialised": Case(materialised=True),
    "tp2": Case({"tensor_parallel": 2}),
    "tp2_materialised": Case({"tensor_parallel": 2}, materialised=True),
    "tp2_sp": Case(TP2_SP),
    "tp2_sp_materialised": Case(TP2_SP, materialised=True),
    "tp4_sp": Case({"tensor_parallel": 4, "sequence_parallel": True}),
    "pp2": Case({"pipeline_parallel": 2}),
    "dp2": Case({"data_parallel": 2}),
    "dp2_distributed_optimizer": Case(DP2_DISTRIBUTED),
    "tp2_sp_pp2": Case({**TP2_SP, "pipeline_parallel": 2}),
    "tp2_sp_dp2_distributed_optimizer": Case({**TP2_SP, **DP2_DISTRIBUTED}),
    "cp2": Case(CP2),
    "cp4": Case({"context_parallel": 4}),
    "cp2_tp2": Case({**CP2, "tensor_parallel": 2}),
    "cp2_tp2_sp": Case({**CP2, **TP2_SP}),
    "cp2_pp2": Case({**CP2, "pipeline_parallel": 2}),
    "cp2_dp2": Case({**CP2, "data_parallel": 2}),
    "cp2_dp2_distributed_optimizer": Case({**CP2, **DP2_DISTRIBUTED}),
    "packed_cp2": Case(CP2, packed=True),
    "packed_cp4": Case({"context_parallel": 4}, packed=True),
    "packed_tp2_sp": Case(TP2_SP, packed=True),
    "packed_pp2_dp2": Case({"pipeline_parallel": 2, "data_parallel": 2}, packed=True),
    "packed_cp2_tp2_sp": Case({**CP2, **TP2_SP}, packed=True),
    "packed_cp2_pp2": Case({**CP2, "pipeline_parallel": 2}, packed=True),
    # Packed, the two replicas have 3 and 2 micro-batches.
    "experts_ep2_dp2_packed": Case({"expert_parallel": 2, "data_parallel": 2}, packed=True, kind="qwen3_moe"),
    "experts_ep2_cp2": Case({"expert_parallel": 2, **CP2}, kind="qwen3_moe"),
    "experts_ep2_tp2_sp": Case({"expert_parallel": 2, **TP2_SP}, kind="qwen3_moe"),
    "experts_ep2_etp2_cp2_tp2_sp_packed": Case(
        {"expert_parallel": 2, "expert_tensor_parallel": 2, **CP2, **TP2_SP}, packed=True, kind="qwen3_moe"
    ),
    "experts_ep4_cp2_dp2_packed": Case(
        {"expert_parallel": 4, **CP2, "data_parallel": 2}, packed=True, kind="qwen3_moe"
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each of its ranks measured."""
    measured: dict[str, list[dict[str, Any]]] = {}
    cases = SINGLE | CASES
    for world_size in sorted({case.world_size for case in cases.values()}):
        together = {name: case for name, case in cases.items() if case.world_size == world_size}
        ranks = run_ranks(run_cases, world_size, together, models)
        measured |= {name: [rank[name] for rank in ranks] for name in together}
    return measured


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", SINGLE)
def test_one_process_equals_the_dense_reference(
    case: str, objective: str, results: dict[str, list[dict[str, Any]]], models: Path
) -> None:
    loss, gradients = dense_reference(models / SINGLE[case].kind, objective)
    measured = results[case][0][objective]
    assert measured["statistics"]["loss/opd"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(measured["gradients"], gradients, tol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    (single,) = next(results[key] for key, case in SINGLE.items() if case.kind == CASES[name].kind)
    assert len(results[name]) == CASES[name].world_size
    for rank in results[name]:
        assert_same_result(rank, single)
