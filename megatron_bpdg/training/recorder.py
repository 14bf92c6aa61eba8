"""What a run leaves behind: metrics, drift, evaluations and sample responses, written by rank 0."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.config.load import dump_config
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.evaluation.benchmark import EvalResult, append_eval
from megatron_bpdg.tracking import run_directory
from megatron_bpdg.tracking.files import write_text
from megatron_bpdg.tracking.metrics import MetricsLogger
from megatron_bpdg.tracking.progress import TrainingProgress
from megatron_bpdg.training.run import Run
from megatron_bpdg.training.step import StepReport

# Responses kept per step for the report's reader.
_SAMPLES = 2
# Mean difference of log-probs below which two models count as the same.
_SAME_NATS = 1e-4


class Recorder:
    """Context manager; every rank has one, only rank 0 writes. All methods may be called on all ranks.

    Args:
        overwrite: delete an earlier run in the same directory, now that everything else was right.
    """

    def __init__(self, cfg: RunConfig, run: Run, *, overwrite: bool = False) -> None:
        self.cfg, self.run, self.overwrite = cfg, run, overwrite
        self.writes = dist.get_rank() == 0
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        if self.writes:
            output = self.cfg.output
            run_directory.start(output, overwrite=self.overwrite)
            write_text(output / "config.yaml", dump_config(self.cfg))
            self.metrics = self._exits.enter_context(
                MetricsLogger(
                    output, self.cfg.logging.tensorboard, self.cfg.logging.wandb, self.cfg.model_dump(mode="json")
                )
            )
            models = {"student": self.run.hf_config, "teacher": self.run.teacher_hf_config}
            parameters = {role: mapping_for(config).num_parameters for role, config in models.items() if config}
            self.metrics.log(0, {f"model/{role}_parameters": number for role, number in parameters.items()})
            self.samples = self._exits.enter_context((output / "samples.jsonl").open("a"))
            self.progress = self._exits.enter_context(TrainingProgress(self.cfg.training.steps, output.name))
            for text in self.run.warnings:
                self.progress.note(f"warning: {text}")
            for name, prompts in {"train": self.run.prompts, **self.run.benchmarks}.items():
                if prompts.dropped or prompts.truncated:
                    self.progress.note(
                        f"{name}: {prompts.dropped} prompts dropped and {prompts.truncated} cut at "
                        f"data.max_prompt_tokens = {self.cfg.data.max_prompt_tokens}"
                    )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.__exit__(kind, error, trace)

    def step(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        reports: Sequence[tuple[int, StepReport]],
        mismatch: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> None:
        """Record one step of the distillation loop: `reports` are (epoch, report) of its updates in order."""
        if not self.writes:
            return
        tokens = sum(len(t.response_ids) for t in trajectories)
        values = {
            **_mean_over_updates(reports),
            **mismatch,
            **{f"time/{phase}_s": spent for phase, spent in seconds.items()},
            "train/updates": float(len(reports)),
            "rollout/reward_mean": sum(bool(t.correct) for t in trajectories) / len(trajectories),
            "rollout/response_tokens_mean": tokens / len(trajectories),
            "rollout/truncated_fraction": sum(not t.finished for t in trajectories) / len(trajectories),
            "rollout/empty": float(_asked_for(self.cfg) - len(trajectories)),
            "rollout/retries": float(self.run.engine.retries),
            "rollout/version_lag_mean": _mean_version_lag(trajectories, step - 1),
            "rollout/tokens_per_s": tokens / seconds["rollout"],
        }
        self.metrics.log(step, values)
        for update, (epoch, report) in enumerate(reports):
            self.metrics.log_drift(step, update, epoch, report.block_drift, report.block_tokens)
        for trajectory in trajectories[:_SAMPLES]:
            record = {
                "step": step,
                "prompt": self.run.tokenizer.decode(trajectory.prompt_ids),
                "response": self.run.decode(trajectory.response_ids),
                "correct": trajectory.correct,
            }
            self.samples.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.samples.flush()
        self.progress.update(
            step,
            {
                "loss": values["loss/opd"],
                "reward": values["rollout/reward_mean"],
                "gate": values["gate/mean"],
                "tok/s": values["rollout/tokens_per_s"],
            },
        )

    @contextmanager
    def rollout(self, step: int) -> Iterator[Callable[[Sequence[Trajectory]], None]]:
        """Progress of a step's rollouts; yields what to call with each group that has been finished."""
        start, responses, tokens = time.perf_counter(), 0, 0

        def on_group(group: Sequence[Trajectory]) -> None:
            nonlocal responses, tokens
            responses += len(group)
            tokens += sum(len(trajectory.response_ids) for trajectory in group)
            if self.writes:
                rate = tokens / (time.perf_counter() - start)
                self.progress.status(f"step {step}: {responses}/{_asked_for(self.cfg)} responses  {rate:.0f} tok/s")

        yield on_group

    def warn_if_same(self, micro_batches: Sequence[Sequence[Trajectory]]) -> None:
        """Say so when the teacher's first log-probs are the student's own: it has nothing to teach then."""
        differences = [
            (t.teacher_logprobs_R.float() - t.old_logprobs_R).abs()
            for chunk in micro_batches
            for t in chunk
            if t.teacher_logprobs_R is not None and t.old_logprobs_R is not None
        ]
        if self.writes and differences and float(torch.cat(differences).mean()) < _SAME_NATS:
            self.progress.note(
                "warning: the teacher's log-probs equal the student's own to within "
                f"{_SAME_NATS:g} nats: is `teacher` the student's checkpoint, or its servers the student's?"
            )

    def supervised_step(self, step: int, report: StepReport, seconds: Mapping[str, float]) -> None:
        """Record one supervised update."""
        if not self.writes:
            return
        statistics = report.statistics
        self.metrics.log(
            step,
            {
                "loss/sft": statistics["loss/opd"],
                "actor/entropy": statistics["actor/entropy"],
                "train/grad_norm": statistics["train/grad_norm"],
                "train/lr": statistics["train/lr"],
                "train/tokens_per_s": statistics["train/tokens"] / seconds["update"],
                "time/update_s": seconds["update"],
            },
        )
        self.progress.update(step, {"loss": statistics["loss/opd"]})

    def evaluations(self, step: int, results: Sequence[EvalResult]) -> None:
        """Record evaluations made after `step` steps."""
        if not self.writes:
            return
        for result in results:
            append_eval(self.cfg.output, result)
            scores = {f"pass@{k}": result.pass_at(k).value for k in self.cfg.evaluation.k}
            self.metrics.log(step, {f"eval/{result.benchmark}/{name}": score for name, score in scores.items()})
            self.progress.note(
                f"step {step}  {result.benchmark}: "
                + "  ".join(f"{name} {100 * score:.1f}%" for name, score in scores.items())
            )


def _asked_for(cfg: RunConfig) -> int:
    """Responses of one step."""
    return cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt


def _mean_version_lag(trajectories: Sequence[Trajectory], version: int) -> float:
    """Mean over tokens of how many steps older than `version` the weights were that sampled them."""
    lags = [version - t.version_R.float() for t in trajectories if t.version_R is not None]
    return float(torch.cat(lags).mean()) if lags else 0.0


def _mean_over_updates(reports: Sequence[tuple[int, StepReport]]) -> dict[str, float]:
    """Mean over the step's updates (the least for gate/min), and the block drift of each epoch by itself."""
    values: dict[str, list[float]] = defaultdict(list)
    for epoch, report in reports:
        for name, value in report.statistics.items():
            values[name].append(value)
            if name == "drift/block_mean":
                values[f"{name}_epoch{epoch}"].append(value)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    counts = {name: sum(values[name]) for name in ("weight/empty_updates",) if name in values}
    return {**means, **counts, "gate/min": min(values["gate/min"])}
