"""gradient_accumulation_fusion: every main gradient is what it is without, in real Megatron-Core layers under its DDP.

A stand-in for apex's CUDA extension does its arithmetic, and counts. All of it runs with deterministic algorithms:
torch then fills uninitialised memory with NaN, and a placeholder that is added to a main gradient by mistake shows.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bpdg.data.trajectory import Trajectory
from tests.integration.miniature import Miniature, make_miniature, metrics, weights
from tests.parallel.layouts import UPDATES, Case, assert_same_result, responses, run_case
from tests.parallel.models import trajectories, write_checkpoint
from tests.parallel.spawn import run_ranks

EXTENSION = "fused_weight_gradient_mlp_cuda"
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
DP2 = {"data_parallel": 2}
CASES = {
    "tied": Case(),
    "untied": Case(student="untied"),
    "biased": Case(student="biased"),
    "tied_materialised": Case(materialised=True),
    "untied_materialised": Case(student="untied", materialised=True),
    "experts": Case(kind="qwen3_moe"),
    "tp2": Case({"tensor_parallel": 2}, student="untied"),
    "tp2_sp": Case(TP2_SP),
    "tp2_sp_materialised": Case(TP2_SP, materialised=True),
    "pp2": Case(PP2),
    "pp2_untied": Case(PP2, student="untied"),
    "pp2_materialised": Case(PP2, materialised=True),
    "dp2": Case(DP2),
    "dp2_distributed_optimizer": Case({**DP2, "distributed_optimizer": True}, student="untied"),
    "cp2_packed": Case({"context_parallel": 2}, packed=True),
}


def stand_in(calls: Counter[str]) -> ModuleType:
    """Apex's extension: adds the product of a layer's output gradient and input to its main gradient."""
    module = ModuleType(EXTENSION)

    def accumulate(name: str, dtypes: tuple[torch.dtype, ...]) -> Any:
        def wgrad_gemm_accum(input_NI: torch.Tensor, grad_NO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
            assert main_grad_OI.dtype in dtypes
            assert input_NI.dtype == grad_NO.dtype
            main_grad_OI.addmm_(grad_NO.t().to(main_grad_OI.dtype), input_NI.to(main_grad_OI.dtype))
            calls[name] += 1

        return wgrad_gemm_accum

    for name, dtypes in (("fp32", (torch.float32,)), ("fp16", (torch.float16, torch.bfloat16))):
        setattr(module, f"wgrad_gemm_accum_{name}", accumulate(name, dtypes))
    return module


def with_silence() -> list[Trajectory]:
    """Six of them without a token that counts: on one replica or two, a micro-batch between others has none."""
    silent = trajectories(6)
    for trajectory in silent:
        trajectory.mask_R = torch.zeros(len(trajectory.response_ids), dtype=torch.bool)
    spoken = responses()
    return [*spoken[:6], *silent, *spoken[6:]]


def with_and_without(cases: Mapping[str, Case], models: Path) -> dict[str, Any]:
    """Results of every case, with fusion ("fused") and without, and how often layers and head added by themselves."""
    assert not any(name.startswith("megatron.core") for name in sys.modules), "it looks for the extension on import"
    calls: Counter[str] = Counter()
    sys.modules[EXTENSION] = stand_in(calls)
    from megatron_bpdg.parallel.weight_gradient import WeightGradient

    made = WeightGradient.__init__

    def counted(self: WeightGradient, weight_VH: Any, accumulate: bool, dtype: torch.dtype) -> None:
        calls["head"] += accumulate
        made(self, weight_VH, accumulate, dtype)

    torch.use_deterministic_algorithms(True)
    report: dict[str, Any] = {}
    with (
        mock.patch.object(WeightGradient, "__init__", counted),
        mock.patch("tests.parallel.layouts.responses", with_silence),
    ):
        for name, case in cases.items():
            for variant, fusion in (("plain", False), ("fused", True)):
                calls.clear()
                result = run_case(dataclasses.replace(case, fusion=fusion), models)
                report[f"{name} {variant}"] = result, dict(calls)
    return report


def one_rank(cases: Mapping[str, Case], models: Path, miniature: Miniature, folder: Path) -> dict[str, Any]:
    """All of that, and whole runs: which of a run's models fuse, what it logged and saved."""
    report = with_and_without(cases, models)
    from megatron_bpdg.teacher.megatron import MegatronTeacher
    from megatron_bpdg.training import build, loop

    for setting in ("auto", False):
        built: list[Any] = []

        def build_run(cfg: Any, built: list[Any] = built) -> Any:
            built.append(build.build_run(cfg))
            return built[0]

        cfg = miniature.config(
            folder / str(setting),
            {
                "objective": {"name": "lsm", "top_k": 8},
                "rollout": {"sampling": {"max_new_tokens": 8}},
                "training": {"steps": 1, "gradient_accumulation_fusion": setting},
            },
        )
        with (
            mock.patch.object(loop, "build_run", build_run),
            # As if there were a GPU; the config's choice asks for nothing else.
            mock.patch.object(build, "default_device", return_value=torch.device("cuda")),
        ):
            loop.distill(cfg)
        assert isinstance(built[0].teacher, MegatronTeacher)
        policies = (built[0].student, built[0].teacher.policy)
        fuse = [policy.unwrapped.config.gradient_accumulation_fusion for policy in policies]
        logged, saved = metrics(cfg.output), weights(cfg.output / "checkpoints")
        report[f"run {setting}"] = fuse, logged, saved
    return report


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("qwen3", "qwen3_moe"):
        write_checkpoint(folder / kind / "student", tied=True, seed=1, kind=kind, layers=2)
        write_checkpoint(folder / kind / "teacher", tied=False, seed=2, kind=kind, layers=2)
    write_checkpoint(folder / "qwen3" / "untied", tied=False, seed=3, layers=2)
    # Qwen2's layers have biases, whose gradients are autograd's.
    write_checkpoint(folder / "qwen3" / "biased", tied=True, seed=4, layers=2, kind="qwen2")
    return folder


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, list[Any]]:
    measured: dict[str, list[Any]] = {}
    miniature = make_miniature(models / "miniature")
    for world_size in (1, 2):
        together = {name: case for name, case in CASES.items() if case.world_size == world_size}
        if world_size == 1:
            ranks = run_ranks(one_rank, 1, together, models, miniature, models / "runs", fresh=True)
        else:
            ranks = run_ranks(with_and_without, world_size, together, models, fresh=True)
        measured |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return measured


@pytest.mark.parametrize("name", CASES)
def test_main_gradients_are_those_without_fusion(name: str, results: dict[str, list[Any]]) -> None:
    case = CASES[name]
    for (fused, _), (plain, _) in zip(results[f"{name} fused"], results[f"{name} plain"], strict=True):
        if not case.layout.get("distributed_optimizer"):
            assert all("gradients" in fused[update] for update in UPDATES)
        assert_same_result(fused, plain)


@pytest.mark.parametrize("name", CASES)
def test_layers_and_head_add_by_themselves_where_they_should(name: str, results: dict[str, list[Any]]) -> None:
    case = CASES[name]
    for _, calls in results[f"{name} plain"]:
        assert not +Counter(calls)
    for rank, (_, calls) in enumerate(results[f"{name} fused"]):
        assert calls["fp32"] > 0
        has_head = rank == 1 if case.layout == PP2 else True
        assert (calls.get("head", 0) > 0) == (has_head and not case.materialised)


def test_a_run_fuses_its_student_alone_and_is_the_same_run(results: dict[str, list[Any]]) -> None:
    ((fuse, logged, saved),) = results["run auto"]
    ((plain_fuse, plain_logged, plain_saved),) = results["run False"]
    assert fuse == [True, False]
    assert plain_fuse == [False, False]
    for record, expected in zip(logged, plain_logged, strict=True):
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, tensor in plain_saved.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-4)
