"""The whole YAML file; its sections stand in files of their own. Every field states its unit or source."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.data import Data
from megatron_bpdg.config.evaluation import Evaluation
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.logging import Logging
from megatron_bpdg.config.objective import ObjectiveConfig
from megatron_bpdg.config.rollout import Rollout
from megatron_bpdg.config.section import Section
from megatron_bpdg.config.student import Model
from megatron_bpdg.config.teacher import Teacher
from megatron_bpdg.config.training import Training
from megatron_bpdg.config.weights import DriftGate, GateConfig, WeightConfig


class RunConfig(Section):
    """The whole YAML file."""

    kind: Literal["opd", "sft"] = "opd"
    output: Path = Field(description="run directory; must be new or empty")
    seed: int = Field(0, ge=0)
    layout: Layout = Layout()
    student: Model
    teacher: Teacher | None = None
    data: Data
    rollout: Rollout = Rollout()
    objective: ObjectiveConfig
    gate: GateConfig | None = Field(None, description="short for a drift_gate among the weights; null: none here")
    weights: list[WeightConfig] = Field(
        default_factory=list, description="factors of the tokens' weights; they multiply (docs/concepts.md)"
    )
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @property
    def drift_gate(self) -> GateConfig | None:
        """The one gate of the run, wherever it is given."""
        return next((weight for weight in self.weights if isinstance(weight, DriftGate)), self.gate)

    @model_validator(mode="after")
    def _one_gate(self) -> RunConfig:
        gates = sum(isinstance(weight, DriftGate) for weight in self.weights) + (self.gate is not None)
        if gates > 1:
            raise ValueError(f"gate and weights hold {gates} drift gates: a run measures one drift; keep one of them")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.kind == "sft") != (self.objective.name == "sft"):
            raise ValueError(f"kind: {self.kind} does not go with objective.name: {self.objective.name}")
        if self.kind == "opd" and self.teacher is None:
            raise ValueError("kind: opd needs a `teacher` section")
        sections, fields = {
            "sft": (["gate", "weights", "teacher"], ["epochs", "minibatches", "old_logprobs"]),
            "opd": ([], ["batch_size"]),
        }[self.kind]
        unused = [name for name in sections if getattr(self, name)]
        unused += [f"training.{name}" for name in self.training.changed(fields)]
        if unused:
            raise ValueError(f"kind: {self.kind} does not use {', '.join(unused)}: remove it")
        if self.teacher is not None and self.teacher.servers is not None and self.rollout.servers is not None:
            both = {url.rstrip("/") for url in self.teacher.servers.urls} & {
                url.rstrip("/") for url in [*self.rollout.servers.urls, *(self.rollout.weight_sync.urls or [])]
            }
            if both:
                raise ValueError(
                    f"{', '.join(sorted(both))} is in teacher.servers and in rollout.servers: the student's weights "
                    "would replace the teacher's"
                )
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.kind == "opd" and samples < self.training.minibatches:
            raise ValueError(
                f"training.minibatches = {self.training.minibatches} exceeds the {samples} responses of a step "
                "(rollout.prompts_per_step * rollout.samples_per_prompt)"
            )
        return self
