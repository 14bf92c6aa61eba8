"""Where log pi_old comes from: the trainer's own pass over the responses, or what the sampler said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.teacher.megatron import score
from megatron_bpdg.training.step import StepReport


class Behaviour(Protocol):
    """The policy that drift is measured from. Methods are collective over the run's ranks."""

    def score(self, micro_batches: Sequence[Sequence[Trajectory]], version: int) -> None:
        """Fill in `old_logprobs_R` of this replica's responses, sampled by weights of step `version` or older."""
        ...

    def mismatch(self, first: StepReport) -> dict[str, float]:
        """How far sampler and trainer are apart on the same weights, in nats; `first` is the step's first update."""
        ...


class TrainerBehaviour:
    """The student as the trainer computes it, before the step's first update.

    Args:
        student: its weights are the sampler's.
        temperature: of the sampling.
    """

    def __init__(self, student: MegatronPolicy, temperature: float) -> None:
        self.student, self.temperature = student, temperature
        self._mismatch: dict[str, float] = {}

    def score(self, micro_batches: Sequence[Sequence[Trajectory]], version: int) -> None:
        sums = torch.zeros(3, dtype=torch.float64)
        for trajectory, scores in score(self.student, micro_batches, TeacherNeeds(), self.temperature):
            trajectory.old_logprobs_R = scores["logprobs"].float()
            difference = trajectory.old_logprobs_R.double() - trajectory.sampler_logprobs_R.double()
            if trajectory.version_R is not None:
                # Older weights (partial rollouts) differ for a reason of their own.
                difference = difference[trajectory.version_R == version]
            if self.student.mesh.is_leader:
                k3 = torch.expm1(difference) - difference
                sums.add_(torch.stack([torch.ones_like(difference).sum(), difference.abs().sum(), k3.sum()]))
        sums = sums.to(next(self.student.module.parameters()).device)
        dist.all_reduce(sums)
        count, absolute, k3 = sums.tolist()
        self._mismatch = {"mismatch/abs_mean": absolute / count, "mismatch/kl": k3 / count} if count else {}

    def mismatch(self, first: StepReport) -> dict[str, float]:
        """`mismatch/kl` is the k3 estimate of KL(sampler || trainer) on the sampled tokens, `mismatch/abs_mean` the
        mean absolute difference of their log-probs.

        Both sides are the full distribution at the sampling temperature; with top_p < 1 the tokens it is averaged over
        come from the truncated one.
        """
        return self._mismatch


class SamplerBehaviour:
    """What the sampler said about its own tokens."""

    def score(self, micro_batches: Sequence[Sequence[Trajectory]], version: int) -> None:
        for trajectory in (t for chunk in micro_batches for t in chunk):
            trajectory.old_logprobs_R = trajectory.sampler_logprobs_R

    def mismatch(self, first: StepReport) -> dict[str, float]:
        """The first update's drift from the sampler is what the two say about the same weights."""
        return {"mismatch/abs_mean": first.statistics["drift/abs_mean"]}
