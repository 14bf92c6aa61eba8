"""What a training loop holds, and the few things that it does with the whole of it. `build` makes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_bpdg.checkpoint.live import LiveWeights, save_weights
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.graders import Grader
from megatron_bpdg.data.prompts import Prompts
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.partition import Partition
from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.evaluation.evaluate import evaluate
from megatron_bpdg.models.policy import MegatronPolicy, to_batches
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.together import everyone
from megatron_bpdg.rollout.engine import Probe, RolloutEngine
from megatron_bpdg.teacher.megatron import score
from megatron_bpdg.teacher.teacher import Teacher
from megatron_bpdg.training.behaviour import Behaviour
from megatron_bpdg.training.step import NonFiniteError, StepReport, Updater

# Length of the text by which a sampler's copy of the weights is checked.
PROBE_TOKENS = 64
# How far sampler and trainer may be apart on the same weights, by rounding alone (nats on a token, on average).
ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}


class MismatchError(RuntimeError):
    """The sampler's log-probs are not the trainer's: training on them would go wrong in silence."""


@dataclass
class Run:
    """Everything a training loop holds."""

    cfg: RunConfig
    hf_folder: Path
    hf_config: dict[str, Any]
    tokenizer: Any
    grader: Grader
    student: MegatronPolicy
    module: DistributedDataParallel
    updater: Updater
    scheduler: OptimizerParamScheduler
    behaviour: Behaviour
    partition: Partition
    engine: RolloutEngine
    prompts: Prompts = field(default_factory=Prompts)
    benchmarks: dict[str, Prompts] = field(default_factory=dict)
    # What the user should know, though the run goes on.
    warnings: list[str] = field(default_factory=list)
    teacher_hf_config: dict[str, Any] | None = None
    _teacher: Teacher | None = None

    @property
    def teacher(self) -> Teacher:
        assert self._teacher is not None, "a supervised run has no teacher"
        return self._teacher

    def update(self, micro_batches: Sequence[Sequence[Trajectory]]) -> StepReport:
        """One optimizer update over this replica's micro-batches, and the next learning rate.

        Raises:
            NonFiniteError: on all ranks alike, before the weights are touched.
        """
        report = self.updater.update(to_batches(micro_batches, self.student))
        self.scheduler.step(increment=1)
        return report

    def sync_weights(self, version: int) -> None:
        """Send the student's weights to the sampler."""
        probe = None
        if self.cfg.rollout.engine == "sglang":
            tolerance = self.cfg.rollout.weight_sync.probe_tolerance
            probe = make_probe(self.student, tolerance or ROUNDING[self.cfg.student.dtype])
        self.engine.load_weights(LiveWeights([self.module], self.hf_config, self.hf_folder), version, probe)

    def check_mismatch(self, mismatch: Mapping[str, float]) -> None:
        """Raise MismatchError where sampler and trainer differ by more than rounding; see `Behaviour.mismatch`."""
        apart = mismatch.get("mismatch/abs_mean", 0.0)
        allowed = self.cfg.training.max_mismatch or ROUNDING[self.cfg.student.dtype]
        if not apart <= allowed:
            raise MismatchError(
                f"sampler and trainer are {apart:.3g} nats a token apart on the same weights (mismatch/abs_mean at "
                f"step 1), allowed {allowed:g} (training.max_mismatch): they are not the same model. Likely causes: "
                "fields of config.json, the rotary ones above all, that the two read differently; another dtype or a "
                "quantised model on the server; a router in front of servers of other models. `bpdg convert "
                "--verify-logits TEXT` compares HF's model with the trainer's, `bpdg doctor --server URL` says what a "
                "server serves"
            )

    def close(self) -> None:
        """Let go of servers."""
        self.engine.close()
        if self._teacher is not None:
            self._teacher.close()

    def evaluate(self, step: int) -> list[EvalResult]:
        """pass@k of the sampler's weights on every benchmark; the same result on every rank."""
        return [
            evaluate(
                self.engine,
                name,
                prompts,
                self.tokenizer,
                self.grader,
                self.cfg.evaluation.sampling,
                samples=self.cfg.evaluation.samples,
                step=step,
                seed=self.cfg.seed,
            )
            for name, prompts in self.benchmarks.items()
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of a response, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @contextmanager
    def saving_on_failure(self, step: int) -> Iterator[None]:
        """Save the last good weights when an update fails on all ranks alike, and say where."""
        try:
            yield
        except NonFiniteError as error:
            self.save(step)
            raise NonFiniteError(f"{error}. Saved as of step {step}: {self.cfg.output / 'checkpoints'}") from error

    def save(self, step: int) -> None:
        """Write the student as a torch_dist checkpoint under ``output/checkpoints``."""
        save_weights([self.module], self.cfg.output / "checkpoints", self.hf_folder, iteration=step)


def make_probe(student: MegatronPolicy, tolerance: float) -> Probe:
    """A fixed text of random ids and what the student says about it. Collective."""
    shape = student.shape
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, shape.max_position_embeddings // 2)
    ids: list[int] = torch.randint(shape.vocab_size, (length,), generator=generator).tolist()
    text = Trajectory(0, 0, ids[:1], ids[1:], torch.zeros(length - 1), finished=True)
    text.block_R = torch.zeros(length - 1, dtype=torch.int64)
    heard = [scores["logprobs"].float() for _, scores in score(student, [[text]], TeacherNeeds(), 1.0)]
    return Probe(ids, next(found[0] for found in everyone(heard) if found), tolerance)
