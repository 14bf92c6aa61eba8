"""The main job, top to bottom:

prompts -> rollouts -> teacher -> old log-probs -> epochs of gated updates -> weights to the sampler -> again

With servers, the first two overlap: the teacher is asked about each group of responses as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
import torch.distributed as dist

from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.sampler import PromptSampler
from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.evaluation.evaluate import grade_all
from megatron_bpdg.models.policy import MegatronPolicy, to_batches
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.batch import by_tokens
from megatron_bpdg.rollout.groups import GroupSampler
from megatron_bpdg.rollout.trajectory import Trajectory
from megatron_bpdg.teacher.scoring import Scores, score
from megatron_bpdg.training.deterministic import deterministic
from megatron_bpdg.training.recorder import Recorder
from megatron_bpdg.training.setup import Run, build_run, build_supervised
from megatron_bpdg.training.step import StepReport

# Separates the random streams of shuffles from those of rollouts and evaluation.
SHUFFLE = 2


def distill(cfg: RunConfig) -> None:
    """On-policy distillation as the config says. Every rank of the layout calls this.

    Raises:
        ValueError: where config, checkpoints and data do not fit together.
        NonFiniteError: where a step's loss is not finite.
    """
    with deterministic(cfg.training.deterministic), world(cfg.layout, cfg.seed):
        run = build_run(cfg)
        with closing(run), Recorder(cfg, run) as recorder:
            groups = GroupSampler(cfg.rollout, run.prompts.ids, cfg.seed)
            run.sync_weights(version=0)
            recorder.evaluations(0, run.evaluate(step=0))

            for step in range(1, cfg.training.steps + 1):
                clock = Clock()
                trajectories: list[Trajectory] = []
                with clock("rollout"), recorder.rollout(step) as tell:
                    for group in groups.step(run.engine, step):
                        tell(group)
                        usable = prepare(group, run)
                        grade(usable, run)
                        run.teacher.prefetch(usable)
                        trajectories += usable
                trajectories = in_batch_order(trajectories, cfg)
                first_pass = split(trajectories, cfg, run.student, step, epoch=0)

                with clock("teacher"):
                    run.teacher.score([chunk for update in first_pass for chunk in update])
                with clock("old_logprobs"):
                    mismatch = set_old_logprobs(first_pass, run.student, cfg, version=step - 1)
                run.updater.prepare(trajectories)
                if step == 1:
                    recorder.warn_if_same(first_pass)

                reports: list[tuple[int, StepReport]] = []
                with clock("update"), run.saving_on_failure(step):
                    for epoch in range(cfg.training.epochs):
                        for chunks in split(trajectories, cfg, run.student, step, epoch):
                            reports.append((epoch, run.updater.update(to_batches(chunks, run.student))))
                            run.scheduler.step(increment=1)
                if cfg.training.old_logprobs == "rollout":
                    # The first update's drift from the sampler is what the two say about the same weights.
                    mismatch = {"mismatch/abs_mean": reports[0][1].statistics["drift/abs_mean"]}
                with clock("sync"):
                    run.sync_weights(version=step)

                last = step == cfg.training.steps
                with clock("eval"):
                    results: list[EvalResult] = run.evaluate(step) if last or due(step, cfg.evaluation.every) else []
                recorder.step(step, trajectories, reports, mismatch, clock.seconds)
                recorder.evaluations(step, results)
                if last or due(step, cfg.training.save_every):
                    run.save(step)


def fine_tune(cfg: RunConfig) -> None:
    """Supervised training on given responses (kind: sft): the same step with the negative log-likelihood."""
    with deterministic(cfg.training.deterministic), world(cfg.layout, cfg.seed):
        run, examples = build_supervised(cfg)
        with closing(run), Recorder(cfg, run) as recorder:
            order = PromptSampler(len(examples), cfg.training.batch_size, cfg.seed)
            for step in range(1, cfg.training.steps + 1):
                clock = Clock()
                with clock("update"), run.saving_on_failure(step):
                    chosen = [examples[i] for i in order.batch(step - 1)]
                    (chunks,) = split(chosen, cfg, run.student, step, epoch=0, parts=1)
                    report = run.updater.update(to_batches(chunks, run.student))
                    run.scheduler.step(increment=1)
                recorder.supervised_step(step, report, clock.seconds)
                last = step == cfg.training.steps
                if last or due(step, cfg.evaluation.every):
                    run.sync_weights(version=step)
                    recorder.evaluations(step, run.evaluate(step))
                if last or due(step, cfg.training.save_every):
                    run.save(step)


def grade(trajectories: Sequence[Trajectory], run: Run) -> None:
    """Fill in `correct`; the loss does not read it."""
    answers = [run.prompts.problems[trajectory.problem].answer for trajectory in trajectories]
    verdicts = grade_all([t.response_ids for t in trajectories], answers, run.tokenizer, run.grader)
    for trajectory, verdict in zip(trajectories, verdicts):
        trajectory.correct = verdict


def prepare(group: Sequence[Trajectory], run: Run) -> list[Trajectory]:
    """Check the samples, leave out responses without a token that counts, set the blocks of the others.

    Raises:
        ValueError: for a malformed sample.
    """
    usable = [trajectory for trajectory in group if bool(trajectory.counts.any())]
    for trajectory in usable:
        trajectory.check(run.student.shape.vocab_size)
        trajectory.block_R = run.partition(torch.tensor(trajectory.response_ids))
    return usable


def in_batch_order(trajectories: Sequence[Trajectory], cfg: RunConfig) -> list[Trajectory]:
    """The step's batch in the order of its prompts, which need not be the order in which they finished.

    Raises:
        ValueError: when every response of the step was empty.
    """
    if not trajectories:
        raise ValueError(
            f"all {cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt} responses of this step are empty: "
            "check the rollout engine and rollout.sampling"
        )
    return sorted(trajectories, key=lambda trajectory: trajectory.index)


def split(
    trajectories: Sequence[Trajectory],
    cfg: RunConfig,
    student: MegatronPolicy,
    step: int,
    epoch: int,
    parts: int | None = None,
) -> list[list[list[Trajectory]]]:
    """This replica's micro-batches of each optimizer update of one epoch.

    Which responses share an update depends on the seed, the step and the epoch, never on the layout: a response
    belongs to replica ``trajectory.index % data_parallel`` for good, so a replica may have more or fewer of an update
    than another, or none (an empty micro-batch, so that it still takes part). The first epoch keeps the sampled order:
    the old log-probs are computed in the very micro-batches of the first update, which therefore has gates of exactly
    1. Where dropped responses leave fewer than there are mini-batches, there are fewer updates.
    """
    order = np.arange(len(trajectories))
    if epoch > 0:
        order = np.random.default_rng([cfg.seed, SHUFFLE, step, epoch]).permutation(order)
    size, tokens = cfg.training.micro_batch_size, cfg.training.micro_batch_tokens
    updates = []
    for update in np.array_split(order, min(parts or cfg.training.minibatches, len(order))):
        chosen = [trajectories[i] for i in update]
        mine = [t for t in chosen if t.index % student.groups.data_size == student.groups.data_rank]
        if tokens is not None:
            chunks = by_tokens(mine, tokens * cfg.layout.context_parallel)
        else:
            chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
        updates.append(chunks or [[]])
    return updates


def set_old_logprobs(
    first_pass: Sequence[Sequence[Sequence[Trajectory]]], student: MegatronPolicy, cfg: RunConfig, version: int
) -> dict[str, float]:
    """Fill in log pi_old; returns how far sampler and trainer are apart on the same weights.

    `mismatch/kl` is the k3 estimate of KL(sampler || trainer) on the sampled tokens, `mismatch/abs_mean` the mean
    absolute difference of their log-probs, in nats. Both sides are the full distribution at the sampling temperature;
    with top_p < 1 the tokens it is averaged over come from the truncated one. Tokens that older weights than `version`
    sampled (partial rollouts) are left out.
    """
    if cfg.training.old_logprobs == "rollout":
        for trajectory in (t for update in first_pass for chunk in update for t in chunk):
            trajectory.old_logprobs_R = trajectory.sampler_logprobs_R
        return {}
    sums = torch.zeros(3, dtype=torch.float64)

    def store(trajectory: Trajectory, scores: Scores) -> None:
        trajectory.old_logprobs_R = scores["logprobs"].float()
        difference = trajectory.old_logprobs_R.double() - trajectory.sampler_logprobs_R.double()
        if trajectory.version_R is not None:
            difference = difference[trajectory.version_R == version]
        if student.groups.leads:
            k3 = torch.expm1(difference) - difference
            sums.add_(torch.stack([torch.ones_like(difference).sum(), difference.abs().sum(), k3.sum()]))

    chunks = [chunk for update in first_pass for chunk in update]
    score(student, chunks, TeacherNeeds(), cfg.rollout.sampling.temperature, store)
    sums = sums.to(next(student.module.parameters()).device)
    dist.all_reduce(sums)
    count, absolute, k3 = sums.tolist()
    return {"mismatch/abs_mean": absolute / count, "mismatch/kl": k3 / count} if count else {}


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done after this one."""
    return every > 0 and step % every == 0


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases[phase] = time.perf_counter() - begin

    @property
    def seconds(self) -> dict[str, float]:
        return {**self.phases, "step": time.perf_counter() - self.start}


TRAINERS: dict[str, Callable[[RunConfig], None]] = {"opd": distill, "sft": fine_tune}
