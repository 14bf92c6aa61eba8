"""What the head of the report says about a run, read from its config.yaml and metrics."""

from __future__ import annotations

from typing import Any

from megatron_bpdg.report.run import Run
from megatron_bpdg.tracking.progress import format_seconds

_DEGREES = {"TP": "tensor_parallel", "PP": "pipeline_parallel", "CP": "context_parallel", "DP": "data_parallel"}


def headline(run: Run) -> str:
    if run.config.get("kind") == "sft":
        return "Supervised training"
    objective = (run.config.get("objective") or {}).get("name")
    if objective is None:
        return "Training run"
    gate = f"with gate over {_partition(run.gate)}" if run.gate else "without gate"
    return f"On-policy distillation, {objective} {gate}"


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Labelled values at the top; those the run did not record are left out."""
    cfg = run.config
    layout, training, rollout = (cfg.get(name) or {} for name in ("layout", "training", "rollout"))
    gate, opd = run.gate, cfg.get("kind") == "opd"
    rest = {key: value for key, value in (gate or {}).items() if key != "partition" and value != 0.0}
    degrees = " × ".join(f"{short}{layout.get(name, 1)}" for short, name in _DEGREES.items())
    switches = [name.replace("_", " ") for name in ("sequence_parallel", "distributed_optimizer") if layout.get(name)]
    rows = {
        "Objective": _settings(cfg.get("objective") or {}),
        "Gate": f"{_partition(gate)}, {_settings(rest)}" if gate else "none" if opd else "",
        "Other weights": ", ".join(weight["name"] for weight in run.other_weights),
        "Student": _model(run, "student"),
        "Teacher": _model(run, "teacher"),
        "Training data": (cfg.get("data") or {}).get("train"),
        "Step": f"{rollout.get('prompts_per_step')} prompts × {rollout.get('samples_per_prompt')} samples, "
        f"{training.get('epochs')} epochs × {training.get('minibatches')} updates"
        if rollout and training and opd
        else "",
        "Learning rate": training.get("lr"),
        "Layout": ", ".join([degrees, *switches]) if layout else "",
        "Seed": cfg.get("seed"),
        "Steps": f"{run.metrics[-1]['step']} of {training.get('steps', '?')}" if run.metrics else "",
        "Wall time": format_seconds(run.metrics[-1]["time"] - run.metrics[0]["time"]) if len(run.metrics) > 1 else "",
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _partition(gate: dict[str, Any]) -> str:
    partition = gate.get("partition", {})
    return {
        "fixed": f"blocks of {partition.get('size', 64)} tokens",
        "newline": "newline spans",
        "token": "single tokens",
        "sequence": "whole responses",
    }.get(partition.get("name", "fixed"), str(partition.get("name")))


def _settings(values: dict[str, Any]) -> str:
    """`name, key value, ...` without the switches that are off."""
    on = {key: value for key, value in values.items() if value not in (None, False)}
    return ", ".join(str(value) if key == "name" else f"{key} {value}".replace("_", " ") for key, value in on.items())


def _model(run: Run, role: str) -> str:
    model = run.config.get(role) or {}
    _, parameters = run.series(f"model/{role}_parameters")
    size = f"{parameters[-1] / 1e6:,.2f} M parameters" if len(parameters) else ""
    return ", ".join(
        str(part) for part in (model.get("checkpoint") or model.get("init"), size, model.get("dtype")) if part
    )
