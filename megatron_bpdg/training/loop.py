"""The main job, top to bottom:

prompts -> rollouts -> teacher -> old log-probs -> epochs of gated updates -> weights to the sampler -> again

With servers, the first two overlap: the teacher is asked about each group of responses as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.sampler import PromptSampler
from megatron_bpdg.parallel.world import world
from megatron_bpdg.training.build import build_run, build_supervised
from megatron_bpdg.training.deterministic import deterministic
from megatron_bpdg.training.plan import first_pass, micro_batches, plan_updates
from megatron_bpdg.training.recorder import Recorder
from megatron_bpdg.training.source import RolloutSource


def distill(cfg: RunConfig, *, overwrite: bool = False) -> None:
    """On-policy distillation as the config says. Every rank of the layout calls this.

    Args:
        overwrite: delete an earlier run in `cfg.output` once everything else was right.

    Raises:
        ValueError: where config, checkpoints and data do not fit together.
        NonFiniteError: where a step's loss is not finite.
    """
    with deterministic(cfg.training.deterministic), world(cfg.layout, cfg.seed):
        run = build_run(cfg)
        with closing(run), Recorder(cfg, run, overwrite=overwrite) as recorder:
            source = RolloutSource(run)
            run.sync_weights(version=0)
            recorder.evaluations(0, run.evaluate(step=0))

            for step in range(1, cfg.training.steps + 1):
                clock = Clock()
                with clock("rollout"), recorder.rollout(step) as on_group:
                    batch = source.take(step, on_group)
                updates = plan_updates(batch, cfg, run.student.mesh, step)
                # Scored in the micro-batches of the first epoch, so that its first update finds drift of exactly zero.
                to_score = first_pass(updates)

                with clock("teacher"):
                    run.teacher.score(to_score)
                with clock("old_logprobs"):
                    run.behaviour.score(to_score, version=step - 1)
                run.updater.prepare(batch)
                if step == 1:
                    recorder.warn_if_same(to_score)

                with clock("update"), run.saving_on_failure(step):
                    reports = [(update.epoch, run.update(update.micro_batches)) for update in updates]
                mismatch = run.behaviour.mismatch(reports[0][1])
                if step == 1:
                    run.check_mismatch(mismatch)
                with clock("sync"):
                    run.sync_weights(version=step)

                last = step == cfg.training.steps
                with clock("eval"):
                    results = run.evaluate(step) if last or due(step, cfg.evaluation.every) else []
                recorder.step(step, batch, reports, mismatch, clock.seconds)
                recorder.evaluations(step, results)
                if last or due(step, cfg.training.save_every):
                    run.save(step)


def fine_tune(cfg: RunConfig, *, overwrite: bool = False) -> None:
    """Supervised training on given responses (kind: sft): the same step with the negative log-likelihood."""
    with deterministic(cfg.training.deterministic), world(cfg.layout, cfg.seed):
        run, examples = build_supervised(cfg)
        with closing(run), Recorder(cfg, run, overwrite=overwrite) as recorder:
            order = PromptSampler(len(examples), cfg.training.batch_size, cfg.seed)
            for step in range(1, cfg.training.steps + 1):
                clock = Clock()
                with clock("update"), run.saving_on_failure(step):
                    chosen = [examples[i] for i in order.batch(step - 1)]
                    report = run.update(micro_batches(chosen, cfg, run.student.mesh))
                recorder.supervised_step(step, report, clock.seconds)
                last = step == cfg.training.steps
                if last or due(step, cfg.evaluation.every):
                    run.sync_weights(version=step)
                    recorder.evaluations(step, run.evaluate(step))
                if last or due(step, cfg.training.save_every):
                    run.save(step)


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


TRAINERS: dict[str, Callable[..., None]] = {"opd": distill, "sft": fine_tune}
