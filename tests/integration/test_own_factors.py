"""Whole runs with a `weights:` list: a user's own factors from config, and updates that they leave nothing to learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.controllers.factor import Factor, Response, plain, select
from megatron_bpdg.drift.signals import Signals, SumReduce
from megatron_bpdg.training.loop import distill
from tests.integration.miniature import Miniature, metrics, weights
from tests.integration.test_runs import bpdg

GATE: dict[str, Any] = {"partition": {"name": "fixed", "size": 4}, "tau": 3.0}


class FirstSamples:
    """Keeps the responses of the first `count` samples of every prompt."""

    def __init__(self, count: int) -> None:
        self.count = count

    def prepare(self, responses: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        total = reduce(torch.tensor([len(responses)], dtype=torch.float64))
        assert int(total) == 6
        return [select(torch.full((len(r.response_ids),), r.sample < self.count)) for r in responses]


class OneProblem:
    """Keeps the responses of the batch's first problem."""

    def prepare(self, responses: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        return [select(torch.full((len(r.response_ids),), r.problem == responses[0].problem)) for r in responses]


def halved(signals: Signals) -> Factor:
    return plain(torch.full_like(signals.drift_n, 0.5))


class Broken:
    """Fails on the replica that has the first sample of the first prompt, before the sum over replicas."""

    def prepare(self, responses: Sequence[Response], reduce: SumReduce) -> list[Factor]:
        if any(r.sample == 0 for r in responses):
            raise ValueError("no such thing as a first sample")
        reduce(torch.zeros(1, dtype=torch.float64))
        return [plain(torch.ones(len(r.response_ids))) for r in responses]


def own(name: str, **args: Any) -> dict[str, Any]:
    return {"name": f"{__name__}:{name}", "args": args}


def run(miniature: Miniature, output: Path, *weights: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    distill(miniature.config(output, {"weights": list(weights), **changes}))
    return metrics(output)


def test_a_gate_among_the_weights_is_the_gate(miniature: Miniature, tmp_path: Path) -> None:
    listed = run(miniature, tmp_path / "listed", {"name": "drift_gate", **GATE})
    assert listed == run(miniature, tmp_path / "short", gate=GATE)
    assert listed != run(miniature, tmp_path / "ungated")
    assert min(record["gate/min"] for record in listed) < 0.99


def test_factors_multiply(miniature: Miniature, tmp_path: Path) -> None:
    """Half the weight over the same mass is half the loss of a first update, whose gates are 1."""
    once = {"training": {"steps": 1, "epochs": 1, "minibatches": 1}}
    (whole,) = run(miniature, tmp_path / "whole", {"name": "drift_gate", **GATE}, **once)
    (half,) = run(miniature, tmp_path / "half", own("halved"), {"name": "drift_gate", **GATE}, **once)
    (all_kept,) = run(miniature, tmp_path / "all", own("FirstSamples", count=2), **once)
    (one_kept,) = run(miniature, tmp_path / "one", own("FirstSamples", count=1), **once)
    assert half["loss/opd"] == pytest.approx(0.5 * whole["loss/opd"], rel=1e-6)
    assert half["train/grad_norm"] == pytest.approx(0.5 * whole["train/grad_norm"], rel=1e-5)
    assert all_kept["loss/opd"] == pytest.approx(whole["loss/opd"], rel=1e-6)
    assert one_kept["loss/opd"] != pytest.approx(whole["loss/opd"], rel=1e-3)
    assert one_kept["train/tokens"] == whole["train/tokens"]


def test_updates_without_mass_are_counted_and_change_nothing(miniature: Miniature, tmp_path: Path) -> None:
    first, second = run(miniature, tmp_path / "none", own("FirstSamples", count=0))
    for record in (first, second):
        assert record["train/updates"] == record["weight/empty_updates"] == 4.0
        assert record["loss/opd"] == record["train/grad_norm"] == 0.0
        assert record["drift/abs_mean"] < 1e-7
    saved, start = weights(tmp_path / "none" / "checkpoints"), weights(miniature.student)
    assert all(torch.equal(tensor, start[name]) for name, tensor in saved.items())

    # Without a second epoch's shuffle, the first problem's two responses are both in the first of three mini-batches.
    (record,) = run(
        miniature, tmp_path / "some", own("OneProblem"), training={"steps": 1, "epochs": 1, "minibatches": 3}
    )
    assert (record["train/updates"], record["weight/empty_updates"]) == (3.0, 2.0)
    assert record["train/grad_norm"] > 0.0
    assert "weight/empty_updates" not in run(miniature, tmp_path / "full", own("halved"))[0]


def test_a_factor_that_fails_on_one_rank_ends_the_run(miniature: Miniature, tmp_path: Path) -> None:
    config = miniature.write(
        tmp_path / "run.yaml",
        tmp_path / "run",
        {"weights": [own("Broken")], "layout": {"data_parallel": 2}},
    )
    result = bpdg("train", config)
    assert result.returncode == 1
    assert result.stderr.count("no such thing as a first sample") == 1
