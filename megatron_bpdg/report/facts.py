"""What the head of the report says about a run, read from its config.yaml and metrics."""

from __future__ import annotations

from typing import Any

from megatron_bpdg.report.run import Run
from megatron_bpdg.tracking.progress import format_seconds

_LAYOUT_NAMES = (
    ("TP", "tensor_parallel"),
    ("PP", "pipeline_parallel"),
    ("CP", "context_parallel"),
    ("DP", "data_parallel"),
)


def headline(run: Run) -> str:
    if run.config.get("kind") == "sft":
        return "Supervised training"
    gate = run.config.get("gate")
    objective = run.config.get("objective", {}).get("name")
    if objective is None:
        return "Training run"
    return f"On-policy distillation, {objective} {'with gate over ' + _partition(gate) if gate else 'without gate'}"


def _partition(gate: dict[str, Any]) -> str:
    partition = gate.get("partition", {})
    return {
        "fixed": f"blocks of {partition.get('size', 64)} tokens",
        "newline": "newline spans",
        "token": "single tokens",
        "sequence": "whole responses",
    }.get(partition.get("name", "fixed"), str(partition.get("name")))


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Labelled values at the top; those the run did not record are left out."""
    cfg = run.config
    layout, training, rollout = (cfg.get(name) or {} for name in ("layout", "training", "rollout"))
    rows: list[tuple[str, str | None]] = [
        ("Objective", _settings(cfg.get("objective"))),
        ("Gate", _gate_fact(cfg)),
        ("Student", _model(run, "student")),
        ("Teacher", _model(run, "teacher")),
        ("Training data", _text((cfg.get("data") or {}).get("train"))),
        (
            "Step",
            f"{rollout.get('prompts_per_step')} prompts × {rollout.get('samples_per_prompt')} samples, "
            f"{training.get('epochs')} epochs × {training.get('minibatches')} updates"
            if rollout and training and cfg.get("kind") != "sft"
            else None,
        ),
        ("Learning rate", _text(training.get("lr"))),
        ("Layout", _layout(layout)),
        ("Seed", _text(cfg.get("seed"))),
        ("Steps", f"{run.metrics[-1]['step']} of {training.get('steps', '?')}" if run.metrics else None),
        ("Wall time", None if run.wall_seconds is None else format_seconds(run.wall_seconds)),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _settings(values: dict[str, Any] | None) -> str | None:
    """`name, key value, ...` without the switches that are off."""
    if not values:
        return None
    shown = [
        f"{key} {value}".replace("_", " ")
        for key, value in values.items()
        if key != "name" and value not in (None, False)
    ]
    return ", ".join([*([str(values["name"])] if "name" in values else []), *shown])


def _gate_fact(cfg: dict[str, Any]) -> str | None:
    gate = cfg.get("gate")
    if not gate:
        return "none" if cfg.get("kind") == "opd" else None
    rest = {key: value for key, value in gate.items() if key != "partition" and value != 0.0}
    return f"{_partition(gate)}, {_settings(rest)}"


def _model(run: Run, role: str) -> str | None:
    model = run.config.get(role)
    if not model:
        return None
    parts = [str(model.get("checkpoint") or model.get("init")), str(model.get("dtype", ""))]
    _, parameters = run.series(f"model/{role}_parameters")
    if len(parameters):
        parts.insert(1, f"{parameters[-1] / 1e6:,.2f} M parameters")
    return ", ".join(part for part in parts if part)


def _layout(layout: dict[str, Any]) -> str | None:
    if not layout:
        return None
    sizes = [f"{short}{layout.get(name, 1)}" for short, name in _LAYOUT_NAMES]
    switches = [name for name in ("sequence_parallel", "distributed_optimizer") if layout.get(name)]
    return ", ".join([" × ".join(sizes), *(name.replace("_", " ") for name in switches)])
