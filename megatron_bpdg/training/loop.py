"""The main job, top to bottom:

prompts -> rollouts -> teacher -> old log-probs -> epochs of gated updates -> weights to the sampler -> again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
from megatron_bpdg.rollout.engine import Request, RolloutEngine
from megatron_bpdg.rollout.sampling import sample_seed
from megatron_bpdg.rollout.trajectory import Trajectory
from megatron_bpdg.teacher.scoring import Scores, score
from megatron_bpdg.training.recorder import Recorder
from megatron_bpdg.training.setup import Prompts, Run, build_run, build_supervised
from megatron_bpdg.training.step import StepReport

# Separates the random streams of rollouts, shuffles and evaluation.
ROLLOUT, SHUFFLE = 1, 2


def distill(cfg: RunConfig) -> None:
    """On-policy distillation as the config says. Every rank of the layout calls this.

    Raises:
        ValueError: where config, checkpoints and data do not fit together.
        NonFiniteError: where a step's loss is not finite.
    """
    with world(cfg.layout, cfg.seed):
        run = build_run(cfg)
        with Recorder(cfg, run) as recorder:
            prompt_order = PromptSampler(len(run.prompts), cfg.rollout.prompts_per_step, cfg.seed)
            run.sync_weights(version=0)
            recorder.evaluations(0, run.evaluate(step=0))

            for step in range(1, cfg.training.steps + 1):
                clock = Clock()
                with clock("rollout"):
                    batch = sample_rollouts(run.engine, run.prompts, prompt_order.batch(step - 1), cfg, step)
                    trajectories, dropped = prepare(batch, run)
                with clock("grade"):
                    grade(trajectories, run)
                first_pass = split(trajectories, cfg, run.student, step, epoch=0)

                with clock("teacher"):
                    run.teacher.score([chunk for update in first_pass for chunk in update])
                with clock("old_logprobs"):
                    mismatch = set_old_logprobs(first_pass, run.student, cfg)

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
                recorder.step(step, trajectories, dropped, reports, mismatch, clock.seconds)
                recorder.evaluations(step, results)
                if last or due(step, cfg.training.save_every):
                    run.save(step)


def fine_tune(cfg: RunConfig) -> None:
    """Supervised training on given responses (kind: sft): the same step with the negative log-likelihood."""
    with world(cfg.layout, cfg.seed):
        run, examples = build_supervised(cfg)
        with Recorder(cfg, run) as recorder:
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


def sample_rollouts(
    engine: RolloutEngine, prompts: Prompts, problems: Sequence[int], cfg: RunConfig, step: int
) -> list[Trajectory]:
    """Sample every prompt of the step `samples_per_prompt` times; the same list on every rank."""
    places = [(problem, sample) for problem in problems for sample in range(cfg.rollout.samples_per_prompt)]
    requests = [
        Request(prompts.ids[problem], sample_seed(cfg.seed, ROLLOUT, step, problem, sample))
        for problem, sample in places
    ]
    responses = engine.generate(requests, cfg.rollout.sampling)
    return [
        Trajectory(
            problem=problem,
            sample=sample,
            prompt_ids=request.prompt_ids,
            response_ids=response.ids,
            sampler_logprobs_R=response.logprobs,
            finished=response.finished,
            weight_version=response.weight_version,
        )
        for (problem, sample), request, response in zip(places, requests, responses)
    ]


def grade(trajectories: Sequence[Trajectory], run: Run) -> None:
    """Fill in `correct`; the loss does not read it."""
    answers = [run.prompts.problems[trajectory.problem].answer for trajectory in trajectories]
    verdicts = grade_all([t.response_ids for t in trajectories], answers, run.tokenizer, run.grader)
    for trajectory, verdict in zip(trajectories, verdicts):
        trajectory.correct = verdict


def prepare(batch: Sequence[Trajectory], run: Run) -> tuple[list[Trajectory], int]:
    """Check the samples, drop and count responses without a token that counts, set the blocks of the others.

    Raises:
        ValueError: for a malformed sample, or when every response is empty.
    """
    trajectories = [trajectory for trajectory in batch if bool(trajectory.counts.any())]
    if not trajectories:
        raise ValueError(
            f"all {len(batch)} responses of this step are empty: check the rollout engine and rollout.sampling"
        )
    for trajectory in trajectories:
        trajectory.check(run.student.shape.vocab_size)
        trajectory.block_R = run.partition(torch.tensor(trajectory.response_ids))
    return trajectories, len(batch) - len(trajectories)


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
    belongs to replica ``index % data_parallel`` for good, so a replica may have more or fewer of an update than
    another, or none (an empty micro-batch, so that it still takes part). The first epoch keeps the sampled order: the
    old log-probs are computed in the very micro-batches of the first update, which therefore has gates of exactly 1.
    Where dropped responses leave fewer than there are mini-batches, there are fewer updates.
    """
    order = np.arange(len(trajectories))
    if epoch > 0:
        order = np.random.default_rng([cfg.seed, SHUFFLE, step, epoch]).permutation(order)
    size = cfg.training.micro_batch_size
    updates = []
    for update in np.array_split(order, min(parts or cfg.training.minibatches, len(order))):
        mine = [trajectories[i] for i in update if i % student.groups.data_size == student.groups.data_rank]
        updates.append([mine[i : i + size] for i in range(0, len(mine), size)] or [[]])
    return updates


def set_old_logprobs(
    first_pass: Sequence[Sequence[Sequence[Trajectory]]], student: MegatronPolicy, cfg: RunConfig
) -> dict[str, float]:
    """Fill in log pi_old; returns how far sampler and trainer are apart on the same weights.

    `mismatch/kl` is the k3 estimate of KL(sampler || trainer) on the sampled tokens, `mismatch/abs_mean` the mean
    absolute difference of their log-probs, in nats. With top_p < 1 both are over the truncated samples.
    """
    if cfg.training.old_logprobs == "rollout":
        for trajectory in (t for update in first_pass for chunk in update for t in chunk):
            trajectory.old_logprobs_R = trajectory.sampler_logprobs_R
        return {}
    sums = torch.zeros(3, dtype=torch.float64)
    counts_here = student.groups.is_last_stage and student.groups.tensor.rank() == 0

    def store(trajectory: Trajectory, scores: Scores) -> None:
        trajectory.old_logprobs_R = scores["logprobs"].float()
        difference = trajectory.old_logprobs_R.double() - trajectory.sampler_logprobs_R.double()
        if counts_here:
            k3 = torch.expm1(difference) - difference
            sums.add_(torch.stack([torch.ones_like(difference).sum(), difference.abs().sum(), k3.sum()]))

    chunks = [chunk for update in first_pass for chunk in update]
    score(student, chunks, TeacherNeeds(), cfg.rollout.sampling.temperature, store)
    sums = sums.to(next(student.module.parameters()).device)
    dist.all_reduce(sums)
    count, absolute, k3 = sums.tolist()
    return {"mismatch/abs_mean": absolute / count, "mismatch/kl": k3 / count}


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
