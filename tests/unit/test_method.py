"""From a config to the user's own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.controllers.factor import Factor, plain
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import Signals
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.training.fits import check_objective
from megatron_bpdg.training.method import build_factors, build_gate, build_objective, build_partition


def config(**changes: Any) -> RunConfig:
    base = {
        "output": "x",
        "student": {"checkpoint": "s"},
        "teacher": {"checkpoint": "t"},
        "data": {"train": "d"},
        "objective": {"name": "lsm"},
    }
    return RunConfig.model_validate(base | changes)


def own(name: str, **args: Any) -> dict[str, Any]:
    return {"name": f"{__name__}:{name}", "args": args}


class Late:
    def prepare(self, responses: Any, reduce: Any) -> list[Factor]:
        return []


def soft(signals: Signals) -> Factor:
    return plain(torch.exp(-signals.drift_n.abs()))


class Neither:
    pass


@dataclass
class Whole:
    """An objective over the whole vocabulary."""

    scale: float = 1.0
    differentiates_logprob: bool = False

    @property
    def needs(self) -> TeacherNeeds:
        return TeacherNeeds(full=True)

    def __call__(self, student: Any, signals: Signals) -> Tensor:
        return self.scale * student.log_softmax().sum(-1)


class Parity:
    def __call__(self, response_R: Tensor) -> Tensor:
        return response_R % 2


def test_factors_are_told_apart_by_stage() -> None:
    weights = [own("Late"), {"name": "drift_gate", "tau": 2.0, "clip_min": 0.1}, own("soft")]
    cfg = config(weights=weights)
    live, prepared = build_factors(cfg)
    assert [type(factor).__name__ for factor in prepared] == ["Late"]
    assert [factor.__name__ for factor in live] == ["soft"]  # type: ignore[attr-defined]
    assert build_gate(cfg) == Gate(tau=2.0, clip_min=0.1)
    assert build_gate(config()) == Gate(tau=0.0)
    with pytest.raises(ValueError, match=r"weights\.1\.name = .*Neither': give it a method `prepare"):
        build_factors(config(weights=[own("soft"), own("Neither")]))


def test_what_ones_own_objective_needs_is_asked_of_it() -> None:
    cfg = config(objective=own("Whole", scale=2.0))
    objective = build_objective(cfg.objective)
    assert (type(objective).__name__, objective.scale, objective.needs.full) == ("Whole", 2.0, True)  # type: ignore[attr-defined]
    check_objective(cfg, objective)
    with pytest.raises(ValueError, match=r"training\.head: chunked never makes the logits"):
        check_objective(config(objective=own("Whole"), training={"head": "chunked"}), objective)
    with pytest.raises(ValueError, match=r"Neither' lacks needs, differentiates_logprob, __call__"):
        build_objective(config(objective=own("Neither")).objective)


def test_ones_own_partition_is_checked() -> None:
    gate = config(gate={"partition": own("Parity")}).drift_gate
    assert gate is not None
    partition = build_partition(gate.partition, None)
    assert partition(torch.tensor([2, 3, 5])).tolist() == [0, 1, 1]
    for response in ([3, 3], [2, 3, 2]):
        with pytest.raises(ValueError, match=r"Parity'.* returned something else than block numbers"):
            partition(torch.tensor(response))
