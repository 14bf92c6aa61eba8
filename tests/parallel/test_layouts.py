"""Every layout gives the loss and the gradients of one process, and one process those of a dense HF reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_bpdg.drift import Gate
from megatron_bpdg.objectives.objective import TeacherNeeds, TeacherSignal, build_objective
from megatron_bpdg.objectives.vocabulary import DenseVocab
from megatron_bpdg.rollout.trajectory import Trajectory
from tests.parallel.models import VOCAB, trajectories, write_checkpoint
from tests.parallel.spawn import run_ranks

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled_token": {"name": "sampled_token"},
    "lsm": {"name": "lsm", "top_k": 5},
    "reverse_kl": {"name": "reverse_kl"},
}
# Name -> (objective, responses in the update). With one response, a second replica has none and still takes part.
UPDATES = {**{name: (name, 7) for name in OBJECTIVES}, "one_response": ("lsm", 1)}
NEEDS = TeacherNeeds(top_k=5, full=True)
GATE = Gate(tau=0.7)
TEMPERATURE = 0.9
MICRO_BATCH = 2

LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "tp2_sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "tp4_sp": {"tensor_parallel": 4, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "tp2_sp_pp2": {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
    "tp2_sp_dp2_distributed_optimizer": {
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "data_parallel": 2,
        "distributed_optimizer": True,
    },
    "dp2": {"data_parallel": 2},
    "dp2_distributed_optimizer": {"data_parallel": 2, "distributed_optimizer": True},
}


def objective_config(name: str) -> Any:
    from pydantic import TypeAdapter

    from megatron_bpdg.config.schema import ObjectiveConfig

    return TypeAdapter(ObjectiveConfig).validate_python(OBJECTIVES[name])


def run_layout(layout_fields: dict[str, Any], student_dir: str, teacher_dir: str, train_steps: int) -> dict[str, Any]:
    """Gradients and statistics of one gated step per objective, then a short training; HF names, full tensors."""
    from megatron_bpdg.checkpoint.hf import read_hf_config
    from megatron_bpdg.checkpoint.live import iter_hf_weights, load_weights
    from megatron_bpdg.config.schema import Layout, Training
    from megatron_bpdg.models.policy import MegatronPolicy, to_batches
    from megatron_bpdg.models.qwen3 import Qwen3Shape, build_model
    from megatron_bpdg.parallel.world import world
    from megatron_bpdg.teacher.megatron import MegatronTeacher
    from megatron_bpdg.training.optimizer import build_optimizer, wrap
    from megatron_bpdg.training.step import Updater

    layout = Layout(**layout_fields)
    with world(layout, seed=0):

        def load(path: str) -> tuple[Any, Qwen3Shape]:
            shape = Qwen3Shape.from_hf(read_hf_config(path))
            model = build_model(shape, layout, torch.float32)
            load_weights([model], path)
            return model, shape

        teacher = MegatronTeacher(MegatronPolicy(*load(teacher_dir), layout), NEEDS, TEMPERATURE, offload=False)
        model, shape = load(student_dir)
        module = wrap(model, layout)
        student = MegatronPolicy(module, shape, layout)
        config = read_hf_config(student_dir)

        batch = trajectories()
        for trajectory in batch:
            trajectory.old_logprobs_R = trajectory.sampler_logprobs_R
        groups = student.groups

        def chunks(count: int) -> list[list[Trajectory]]:
            mine = [t for i, t in enumerate(batch[:count]) if i % groups.data_size == groups.data_rank]
            return [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)] or [[]]

        teacher.score(chunks(len(batch)))
        batches = to_batches(chunks(len(batch)), student)
        # A large epsilon: Adam would turn the rounding of near-zero gradients into whole steps.
        training = Training(lr=1e-3, adam_eps=1e-3)
        optimizer, _ = build_optimizer(module, layout, training, torch.float32, total_updates=10)
        result: dict[str, Any] = {}
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        for name, (objective, count) in UPDATES.items():
            loss = build_objective(objective_config(objective))
            updater = Updater(student, module, optimizer, loss, GATE, TEMPERATURE)
            report = updater.accumulate(to_batches(chunks(count), student))
            result[name] = {"statistics": report.statistics, "heat": (report.block_drift, report.block_tokens)}
            if not layout.distributed_optimizer:  # there, a rank holds only its part of the summed gradient
                for parameter in module.parameters():
                    parameter.data.copy_(parameter.main_grad)
                result[name]["gradients"] = dict(iter_hf_weights([module], config))
            for parameter_name, parameter in module.named_parameters():
                parameter.data.copy_(weights[parameter_name])
        updater = Updater(student, module, optimizer, build_objective(objective_config("lsm")), GATE, TEMPERATURE)
        reports = [updater.update(batches) for _ in range(train_steps)]
        result["training"] = {
            "loss": [r.statistics["loss/opd"] for r in reports],
            "grad_norm": [r.statistics["train/grad_norm"] for r in reports],
            "weights": dict(iter_hf_weights([module], config)),
        }
        return result


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return (
        write_checkpoint(folder / "student", tied=True, seed=1),
        write_checkpoint(folder / "teacher", tied=False, seed=2),
    )


@pytest.fixture(scope="module")
def single(checkpoints: tuple[Path, Path]) -> dict[str, Any]:
    return run_ranks(run_layout, 1, {}, str(checkpoints[0]), str(checkpoints[1]), 3)[0]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tol: float) -> None:
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name].double(), expected[name].double()) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tol, f"{worst}: relative error {errors[worst]:.2e}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_process_equals_the_dense_reference(
    objective: str, single: dict[str, Any], checkpoints: tuple[Path, Path]
) -> None:
    """HF's own model, dense operations in float64, one sequence at a time: no padding, no batching, no Megatron."""
    student = Qwen3ForCausalLM.from_pretrained(checkpoints[0], dtype=torch.float64)
    teacher = Qwen3ForCausalLM.from_pretrained(checkpoints[1], dtype=torch.float64)
    loss, mass = torch.zeros((), dtype=torch.float64), 0.0
    for trajectory in trajectories():
        ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
        predicts = slice(len(trajectory.prompt_ids) - 1, -1)
        ops = DenseVocab(student(ids).logits[0, predicts], VOCAB, TEMPERATURE)
        with torch.no_grad():
            said = DenseVocab(teacher(ids).logits[0, predicts], VOCAB, TEMPERATURE)
            values, support = said.topk(5)
        sampled = torch.tensor(trajectory.response_ids)
        logprobs, old = ops.logprob(sampled), trajectory.sampler_logprobs_R.double()
        signal = TeacherSignal(said.logprob(sampled), support, values - said.logsumexp()[:, None], said)
        drift = (logprobs - old).detach()
        gates = torch.cat([torch.exp(-0.7 * block.mean().abs()).expand(len(block)) for block in drift.split(4)])
        per_token = build_objective(objective_config(objective))(ops, sampled, logprobs, old, signal)
        loss = loss + (gates * per_token).sum()
        mass += float(gates.sum())
    (loss / mass).backward()
    measured = single[objective]
    assert measured["statistics"]["loss/opd"] == pytest.approx(float(loss.detach()) / mass, rel=1e-5)
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(measured["gradients"], expected, tol=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, single: dict[str, Any], checkpoints: tuple[Path, Path]) -> None:
    fields = LAYOUTS[name]
    world_size = 1
    for key in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
        world_size *= fields.get(key, 1)
    ranks = run_ranks(run_layout, world_size, fields, str(checkpoints[0]), str(checkpoints[1]), 3)
    for result in ranks:
        for update in UPDATES:
            ours, theirs = result[update], single[update]
            for statistic, value in theirs["statistics"].items():
                assert ours["statistics"][statistic] == pytest.approx(value, rel=2e-5, abs=1e-6), statistic
            assert ours["heat"][0] == pytest.approx(theirs["heat"][0], rel=1e-5)
            assert ours["heat"][1] == theirs["heat"][1]
            if "gradients" in ours:
                assert_same_gradients(ours["gradients"], theirs["gradients"], tol=2e-5)
        assert result["training"]["loss"] == pytest.approx(single["training"]["loss"], rel=1e-4)
        assert result["training"]["grad_norm"] == pytest.approx(single["training"]["grad_norm"], rel=1e-3)
        for weight, value in single["training"]["weights"].items():
            assert (result["training"]["weights"][weight] - value).abs().max() < 2e-5, weight
