"""One gated step, and a short training, in any layout; and the formula that all of them must equal.

Starting ranks costs far more than the work, so one set of ranks goes through all layouts of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bpdg.controllers.factor import Live, Prepared
from megatron_bpdg.data.batch import by_tokens
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import Segments, Signals, TeacherSignal
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.objectives.vocabulary import DenseVocab
from megatron_bpdg.training.method import build_objective
from tests.parallel.models import VOCAB, edge_cases, trajectories, write_checkpoint

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled_token": {"name": "sampled_token"},
    "lsm": {"name": "lsm", "top_k": 5},
    "reverse_kl": {"name": "reverse_kl"},
}
# Name -> (objective, whether of all responses). With one response, a second replica has none and still takes part, as
# do ranks of its context-parallel group that hold none of its tokens.
UPDATES = {**{name: (name, True) for name in OBJECTIVES}, "one_response": ("lsm", False)}
NEEDS = TeacherNeeds(top_k=5, full=True)
TAU = 0.7
TEMPERATURE = 0.9
MICRO_BATCH = 3
MICRO_BATCH_TOKENS = 30
# A few columns of a micro-batch's tokens, a few rows of hidden states.
HEAD_CHUNK_MB = 500e-6
TRAIN_STEPS = 2


@dataclass(frozen=True)
class Case:
    """A way to lay the same step on ranks, and to read the vocabulary."""

    layout: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    kind: str = "qwen3"
    materialised: bool = False
    student: str = "student"
    fusion: bool = False

    @property
    def world_size(self) -> int:
        return math.prod(self.layout.get(f"{axis}_parallel", 1) for axis in ("tensor", "pipeline", "context", "data"))


def responses() -> list[Trajectory]:
    return trajectories() + edge_cases()


def write_models(folder: Path) -> Path:
    """A tied student and an untied teacher, dense and with experts."""
    for kind, layers in (("qwen3", 4), ("qwen3_moe", 2)):
        write_checkpoint(folder / kind / "student", tied=True, seed=1, kind=kind, layers=layers)
        write_checkpoint(folder / kind / "teacher", tied=False, seed=2, kind=kind, layers=layers)
    return folder


def objective_config(name: str) -> Any:
    from pydantic import TypeAdapter

    from megatron_bpdg.config.objective import ObjectiveConfig

    return TypeAdapter(ObjectiveConfig).validate_python(OBJECTIVES[name])


def run_cases(cases: Mapping[str, Case], models: Path) -> dict[str, dict[str, Any]]:
    """On every rank of as many as the cases have."""
    return {name: run_case(case, models) for name, case in cases.items()}


def run_case(
    case: Case,
    models: Path,
    updates: Iterable[str] = tuple(UPDATES),
    train_steps: int = TRAIN_STEPS,
    live: Sequence[Live] = (),
    prepared: Sequence[Prepared] = (),
) -> dict[str, Any]:
    """Gradients and statistics of one gated step per objective, then a short training; HF names, full tensors."""
    from megatron_bpdg.checkpoint.live import iter_hf_weights, load_weights
    from megatron_bpdg.config.layout import Layout
    from megatron_bpdg.config.training import Training
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.models.policy import MegatronPolicy, to_batches
    from megatron_bpdg.models.qwen3 import ModelShape, build_model
    from megatron_bpdg.parallel.head import Head
    from megatron_bpdg.parallel.world import world
    from megatron_bpdg.teacher.megatron import MegatronTeacher
    from megatron_bpdg.training.optimizer import build_optimizer, wrap
    from megatron_bpdg.training.step import Updater

    layout = Layout(**case.layout)
    with world(layout, seed=0):

        def load(role: str, fusion: bool = False) -> tuple[Any, ModelShape]:
            path = models / case.kind / role
            shape = ModelShape.from_hf(read_hf_config(path))
            model = build_model(shape, layout, torch.float32, gradient_accumulation_fusion=fusion)
            load_weights([model], path)
            return model, shape

        def head(needs: TeacherNeeds) -> Head:
            return Head("materialised" if case.materialised or needs.full else "chunked", HEAD_CHUNK_MB)

        teacher_policy = MegatronPolicy(*load("teacher"), layout, packed=case.packed, head=head(NEEDS))
        teacher = MegatronTeacher(teacher_policy, NEEDS, TEMPERATURE, offload=False)
        model, shape = load(case.student, case.fusion)
        module = wrap(model, layout)
        student = MegatronPolicy(module, shape, layout, packed=case.packed)
        config = read_hf_config(models / case.kind / case.student)

        batch = responses()
        for index, trajectory in enumerate(batch):
            trajectory.index, trajectory.old_logprobs_R = index, trajectory.sampler_logprobs_R
        mesh = student.mesh

        def chunks(count: int) -> list[list[Trajectory]]:
            mine = [t for i, t in enumerate(batch[:count]) if mesh.owns(i)]
            if case.packed:
                return by_tokens(mine, MICRO_BATCH_TOKENS) or [[]]
            return [mine[i : i + MICRO_BATCH] for i in range(0, len(mine), MICRO_BATCH)] or [[]]

        teacher.score(chunks(len(batch)))
        # A large epsilon: Adam would turn the rounding of near-zero gradients into whole steps.
        training = Training(lr=1e-3, adam_eps=1e-3)
        optimizer, _ = build_optimizer(module, layout, training, torch.float32, total_updates=10)
        result: dict[str, Any] = {}
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        for name in updates:
            objective, everything = UPDATES[name]
            loss = build_objective(objective_config(objective))
            student.head = head(loss.needs)
            updater = Updater(student, module, optimizer, loss, Gate(tau=TAU), TEMPERATURE, live, prepared)
            updater.prepare(batch)
            report = updater.accumulate(to_batches(chunks(len(batch) if everything else 1), student))
            result[name] = {"statistics": report.statistics, "heat": (report.block_drift, report.block_tokens)}
            if not layout.distributed_optimizer:  # there, a rank holds only its part of the summed gradient
                for parameter in module.parameters():
                    parameter.data.copy_(parameter.main_grad)
                result[name]["gradients"] = dict(iter_hf_weights([module], config))
            for parameter_name, parameter in module.named_parameters():
                parameter.data.copy_(weights[parameter_name])
        if train_steps:
            loss = build_objective(objective_config("lsm"))
            student.head = head(loss.needs)
            updater = Updater(student, module, optimizer, loss, Gate(tau=TAU), TEMPERATURE)
            batches = to_batches(chunks(len(batch)), student)
            reports = [updater.update(batches) for _ in range(train_steps)]
            result["training"] = {
                "loss": [r.statistics["loss/opd"] for r in reports],
                "grad_norm": [r.statistics["train/grad_norm"] for r in reports],
                "weights": dict(iter_hf_weights([module], config)),
            }
        return result


Others = Callable[[Trajectory, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(response, its drift) -> weight and mass of its tokens, beside the gate's."""


def dense_reference(
    models: Path, objective: str, others: Others | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by HF's own model, dense operations in float64, one sequence at a time, no Megatron.

    No padding, no batching: a gate per block from the tokens that count, and the sum over them divided by its mass.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / role, dtype=torch.float64, experts_implementation="eager")
        for role in ("student", "teacher")
    )
    loss, mass = torch.zeros((), dtype=torch.float64), 0.0
    for trajectory in responses():
        ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
        predicts = slice(len(trajectory.prompt_ids) - 1, -1)
        ops = DenseVocab(student(ids).logits[0, predicts], VOCAB, TEMPERATURE)
        with torch.no_grad():
            said = DenseVocab(teacher(ids).logits[0, predicts], VOCAB, TEMPERATURE)
            values, support = said.topk(5)
        sampled = torch.tensor(trajectory.response_ids)
        logprobs, old = ops.logprob(sampled), trajectory.sampler_logprobs_R.double()
        support_logprobs = values - said.logsumexp()[:, None]
        signals = Signals(
            logprobs,
            old,
            trajectory.counts,
            blocks=Segments(trajectory.block_R, int(trajectory.block_R[-1]) + 1),
            sequences=Segments(torch.zeros_like(sampled), 1),
            sampled_N=sampled,
            teacher=TeacherSignal(said.logprob(sampled), support, support_logprobs, said.log_softmax()),
        )
        per_token = build_objective(objective_config(objective))(ops, signals)
        drift = (logprobs - old).detach()
        weight, share = others(trajectory, drift) if others else (torch.ones_like(drift),) * 2
        for block in trajectory.block_R.unique():
            counted = (trajectory.block_R == block) & trajectory.counts
            if bool(counted.any()):
                gate = math.exp(-TAU * abs(float(drift[counted].mean())))
                loss = loss + gate * (weight * per_token)[counted].sum()
                mass += gate * float(share[counted].sum())
    (loss / mass).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()) / mass, dict(_as_saved(gradients))


def _as_saved(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """HF stacks the experts of a layer in memory and not in its files."""
    for name, tensor in tensors.items():
        layer, fused, projection = name.partition(".experts.")
        if not fused:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"gate_proj": 0, "up_proj": 1} if projection == "gate_up_proj" else {projection: 0}
            for part, number in parts.items():
                yield f"{layer}.experts.{expert}.{part}.weight", matrix.chunk(len(parts))[number]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def worst_gradient(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    assert set(actual) == set(expected)
    return max((relative_error(actual[name].double(), expected[name].double()), name) for name in expected)


def assert_same_gradients(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tol: float) -> None:
    error, name = worst_gradient(actual, expected)
    assert error < tol, f"{name}: relative error {error:.2e}"


def assert_same_result(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results of `run_case` differ by rounding alone."""
    for update in UPDATES:
        ours, theirs = actual[update], expected[update]
        for statistic, value in theirs["statistics"].items():
            assert ours["statistics"][statistic] == pytest.approx(value, rel=2e-5, abs=1e-6), statistic
        assert ours["heat"][0] == pytest.approx(theirs["heat"][0], rel=1e-5)
        assert ours["heat"][1] == theirs["heat"][1]
        if "gradients" in ours:
            assert_same_gradients(ours["gradients"], theirs["gradients"], tol=2e-5)
    trained, training = actual["training"], expected["training"]
    assert trained["loss"] == pytest.approx(training["loss"], rel=1e-4)
    assert trained["grad_norm"] == pytest.approx(training["grad_norm"], rel=1e-3)
    for name, value in training["weights"].items():
        assert (trained["weights"][name] - value).abs().max() < 2e-5, name
