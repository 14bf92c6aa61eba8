"""Where a run's numbers go: JSONL always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

METRICS_FILE = "metrics.jsonl"
DRIFT_FILE = "drift.jsonl"
_RESERVED = {"step", "time", "nonfinite"}


class MetricsLogger:
    """Writes one run's metrics. Create it on one rank only, as a context manager.

    `metrics.jsonl`: one line ``{"step": .., "time": seconds since the epoch, name: value, ...}`` per `log`. A value
    that is not finite is written as null and named in ``"nonfinite": [..]``: JSON has no NaN, and a number that
    diverged must not look like one that was never measured.

    Args:
        run_dir: run directory, created if missing; existing files are appended to.
        tensorboard: also write scalars under `run_dir/tensorboard`.
        wandb: Weights & Biases project, or None.
        config: shown beside the metrics by TensorBoard and W&B.

    Raises:
        ModuleNotFoundError: `wandb` is given and the package is missing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, wandb: str | None, config: dict[str, Any]) -> None:
        self._wandb = _start_wandb(wandb, run_dir, config) if wandb is not None else None
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _start_tensorboard(run_dir, config) if tensorboard else None
        self._metrics: TextIO = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._drift: TextIO = (run_dir / DRIFT_FILE).open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record named scalars of one optimizer step."""
        if clash := _RESERVED & values.keys():
            raise ValueError(f"metric names {sorted(clash)} are reserved; use group/name")
        # Tensors and numpy scalars become plain floats here, once, so that every sink sees the same number.
        plain = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in plain.items() if math.isfinite(value)}
        record: dict[str, Any] = {"step": step, "time": time.time(), **{name: finite.get(name) for name in plain}}
        if nonfinite := sorted(plain.keys() - finite.keys()):
            record["nonfinite"] = nonfinite
        _write_line(self._metrics, record)
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def log_drift(
        self, step: int, update: int, epoch: int, abs_drift_by_block: list[float], tokens_by_block: list[int]
    ) -> None:
        """Record one column of the drift heat map: block drift in nats and valid tokens, by block index."""
        if len(abs_drift_by_block) != len(tokens_by_block):
            raise ValueError(
                f"abs_drift_by_block has {len(abs_drift_by_block)} blocks, tokens_by_block {len(tokens_by_block)}"
            )
        record = {
            "step": step,
            "update": update,
            "epoch": epoch,
            "abs_drift_by_block": [value if math.isfinite(value) else None for value in abs_drift_by_block],
            "tokens_by_block": tokens_by_block,
        }
        _write_line(self._drift, record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._metrics.close()
        self._drift.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; a missing file has none.

    A last line without its newline is the mark of a run that was killed while writing, and is left out.

    Raises:
        ValueError: naming file and line that is not a JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}); remove or repair the line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is not a JSON object; remove or repair the line")
            yield record


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """One record per step in ascending order; lines of the same step are merged, later values win."""
    merged: dict[int, dict[str, Any]] = {}
    for record in read_jsonl(run_dir / METRICS_FILE):
        into = merged.setdefault(record["step"], {})
        nonfinite = {*into.get("nonfinite", ()), *record.get("nonfinite", ())}
        nonfinite -= {name for name, value in record.items() if value is not None}
        into |= record
        into["nonfinite"] = sorted(nonfinite)
    return [merged[step] for step in sorted(merged)]


def _write_line(stream: TextIO, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record, allow_nan=False) + "\n")
    stream.flush()


def _start_tensorboard(run_dir: Path, config: dict[str, Any]) -> Any:
    # Importing TensorBoard takes seconds; only runs that use it pay.
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", 0)
    return writer


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"logging.wandb: {project} needs the wandb package: pip install 'megatron-bpdg[wandb]', "
            "or set logging.wandb: null"
        ) from error
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=config)
