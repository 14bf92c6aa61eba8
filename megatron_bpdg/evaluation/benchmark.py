"""Graded responses to a benchmark, and the file that collects them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from megatron_bpdg.evaluation.pass_at_k import Interval, bootstrap, pass_at_k_by_problem

EVAL_FILE = "eval.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """One evaluation.

    Attributes:
        step: optimizer-side step after which it was made; 0 is before training.
        samples: responses per problem (n of pass@k).
        problem_ids: ids ``[P]``, each once.
        correct: right ones among the responses of each problem, ``[P]``.
        truncated_fraction: responses that hit the length limit, as a fraction.
        mean_response_tokens: mean length in tokens.

    Raises:
        ValueError: the fields do not fit together; named.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    benchmark: str
    step: int
    samples: int
    problem_ids: list[str]
    correct: list[int]
    truncated_fraction: float
    mean_response_tokens: float

    def __post_init__(self) -> None:
        place = f"evaluation of {self.benchmark!r} at step {self.step}"
        if self.step < 0 or self.samples < 1:
            raise ValueError(f"{place}: step must be at least 0 and samples = {self.samples} at least 1")
        if not self.problem_ids or len(self.problem_ids) != len(self.correct):
            raise ValueError(f"{place}: {len(self.problem_ids)} problem_ids and {len(self.correct)} counts in correct")
        if len(set(self.problem_ids)) != len(self.problem_ids):
            raise ValueError(f"{place}: a problem id is given twice")
        if outside := [count for count in self.correct if not 0 <= count <= self.samples]:
            raise ValueError(f"{place}: correct has {outside[:5]}, outside 0..{self.samples} samples")
        if not 0.0 <= self.truncated_fraction <= 1.0:
            raise ValueError(f"{place}: truncated_fraction = {self.truncated_fraction} is no fraction")
        if not (math.isfinite(self.mean_response_tokens) and self.mean_response_tokens >= 0.0):
            raise ValueError(f"{place}: mean_response_tokens = {self.mean_response_tokens} is no length")

    def pass_at(self, k: int) -> Interval:
        """Mean pass@k over the problems, as a fraction.

        Raises:
            ValueError: unless ``1 <= k <= samples``.
        """
        return bootstrap(pass_at_k_by_problem(self.samples, self.correct, k))


def append_eval(run_dir: Path, result: EvalResult) -> None:
    """Add a line to the run's eval.jsonl, on disk when this returns.

    An unfinished last line, left by a process that was killed while writing, is removed first.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / EVAL_FILE).open("a+b") as stream:
        stream.seek(0)
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        stream.write(json.dumps(asdict(result), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_evals(run_dir: Path) -> list[EvalResult]:
    """Evaluations of a run in the order written; none where there is no file. An unfinished last line is left out.

    Raises:
        ValueError: naming file and line of a damaged record.
    """
    path = run_dir / EVAL_FILE
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            results.append(TypeAdapter(EvalResult).validate_json(line, strict=True))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; remove or repair the line") from error
    return results
