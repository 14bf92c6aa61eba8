"""Prompts -> the responses that a step trains on: sampled, checked, cut into blocks, graded, known to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.evaluation.evaluate import grade_all
from megatron_bpdg.rollout.groups import GroupSampler
from megatron_bpdg.training.run import Run


class RolloutSource:
    """Takes the complete groups of each step from the sampler.

    With servers, the teacher is asked about each group as soon as it is there, while others are still being sampled.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.groups = GroupSampler(run.cfg.rollout, run.prompts.ids, run.cfg.seed)

    def take(self, step: int, on_group: Callable[[Sequence[Trajectory]], None]) -> list[Trajectory]:
        """The step's responses in the order of its prompts, which need not be the order in which they finished.

        Args:
            on_group: called with each group that is complete.

        Raises:
            ValueError: a malformed sample, or every response of the step is empty.
        """
        taken: list[Trajectory] = []
        for group in self.groups.step(self.run.engine, step):
            on_group(group)
            usable = self.prepare(group)
            self.run.teacher.prefetch(usable)
            taken += usable
        if not taken:
            rollout = self.run.cfg.rollout
            raise ValueError(
                f"all {rollout.prompts_per_step * rollout.samples_per_prompt} responses of this step are empty: "
                "check the rollout engine and rollout.sampling"
            )
        return sorted(taken, key=lambda trajectory: trajectory.index)

    def prepare(self, group: Sequence[Trajectory]) -> list[Trajectory]:
        """Leave out responses without a token that counts; check and grade the others and set their blocks.

        The loss does not read the grade.
        """
        usable = [trajectory for trajectory in group if bool(trajectory.counts.any())]
        for trajectory in usable:
            trajectory.check(self.run.student.shape.vocab_size)
            trajectory.block_R = self.run.partition(torch.tensor(trajectory.response_ids))
        answers = [self.run.prompts.problems[trajectory.problem].answer for trajectory in usable]
        verdicts = grade_all([t.response_ids for t in usable], answers, self.run.tokenizer, self.run.grader)
        for trajectory, verdict in zip(usable, verdicts):
            trajectory.correct = verdict
        return usable
