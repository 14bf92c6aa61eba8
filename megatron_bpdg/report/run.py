"""What a run directory holds, read once for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_bpdg.evaluation.benchmark import EvalResult, read_evals
from megatron_bpdg.tracking.metrics import DRIFT_FILE, read_jsonl, read_metrics

# Its name among the weights.
_GATE = "drift_gate"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A run directory in memory; parts the run did not write are empty."""

    name: str
    directory: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    drift: list[dict[str, Any]]
    evals: list[EvalResult]
    samples: list[dict[str, Any]]

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values where `name` was logged; NaN where it was not finite. Both float64 ``[steps]``."""
        points = [(row["step"], row[name]) for row in self.metrics if name in row]
        steps = np.array([step for step, _ in points], dtype=np.float64)
        values = np.array([math.nan if value is None else value for _, value in points], dtype=np.float64)
        return steps, values

    @property
    def gate(self) -> dict[str, Any] | None:
        """Settings of the gate, given by itself or among the weights; None without one."""
        listed = (weight for weight in self.config.get("weights") or [] if weight["name"] == _GATE)
        gate = next(listed, self.config.get("gate"))
        return gate and {name: value for name, value in gate.items() if name != "name"}

    @property
    def other_weights(self) -> list[dict[str, Any]]:
        """Settings of the weights that are no gate."""
        return [weight for weight in self.config.get("weights") or [] if weight["name"] != _GATE]

    @property
    def gated(self) -> bool:
        """Whether a gate can change the loss: tau = 0 makes it a constant."""
        return self.gate is not None and self.gate.get("tau") != 0

    def names(self, prefix: str = "") -> list[str]:
        """Logged metric names with this prefix, sorted."""
        return sorted({name for row in self.metrics for name in row if name.startswith(prefix)})

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(record.benchmark for record in self.evals))

    def evaluations(self, benchmark: str) -> list[EvalResult]:
        """Evaluations of one benchmark by ascending step; the last one written wins where a step was repeated."""
        by_step = {record.step: record for record in self.evals if record.benchmark == benchmark}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def ks(self) -> list[int]:
        """The k of pass@k: from the config, else 1 and the number of samples."""
        samples = min((record.samples for record in self.evals), default=0)
        asked = self.config.get("evaluation", {}).get("k") or [1, samples]
        return sorted({k for k in asked if 1 <= k <= samples})


def load_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        FileNotFoundError: `run_dir` holds none of the files a run writes.
        ValueError: a file is damaged; the message names file and line or field.
    """
    config_path = run_dir / "config.yaml"
    config = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} is not a mapping of sections")
    run = Run(
        name=run_dir.resolve().name,
        directory=run_dir,
        config=config,
        metrics=read_metrics(run_dir),
        drift=list(read_jsonl(run_dir / DRIFT_FILE)),
        evals=read_evals(run_dir),
        samples=list(read_jsonl(run_dir / "samples.jsonl")),
    )
    if not (config or run.metrics or run.evals):
        raise FileNotFoundError(f"{run_dir} has neither config.yaml nor metrics.jsonl nor eval.jsonl: not a run")
    return run


def load_runs(run_dir: Path, compare: list[Path]) -> list[Run]:
    """The run of the report followed by those to compare with, under names that differ."""
    runs = [load_run(path) for path in (run_dir, *compare)]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    paths = [run.directory.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is given twice among {', '.join(map(str, paths))}; give each once")
    # A study keeps seeds in <variant>/<seed>: the parent tells them apart.
    return [replace(run, name="/".join(path.parts[-2:])) for run, path in zip(runs, paths)]
