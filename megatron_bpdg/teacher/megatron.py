"""An in-process teacher: its own Megatron model in the student's layout."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.teacher.scoring import Scores, score


class MegatronTeacher:
    """Scores responses with a frozen Megatron model.

    Args:
        policy: the teacher's model, weights loaded.
        needs: what the objective reads.
        temperature: the sampling temperature; both sides of every loss refer to it.
        offload: keep the weights in host memory between uses.
    """

    def __init__(self, policy: MegatronPolicy, needs: TeacherNeeds, temperature: float, *, offload: bool) -> None:
        self.policy = policy
        self.needs = needs
        self.temperature = temperature
        self.offload = offload
        policy.module.requires_grad_(False)
        self._move_to(torch.device("cpu"))

    def prefetch(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing to do: this teacher works in the trainer's own time."""

    def close(self) -> None:
        """Nothing to let go of."""

    def score(self, micro_batches: Sequence[Sequence[Trajectory]]) -> None:
        """Fill in the teacher fields of every trajectory."""
        self._move_to(default_device())
        score(self.policy, micro_batches, self.needs, self.temperature, _store)
        self._move_to(torch.device("cpu"))

    def _move_to(self, device: torch.device) -> None:
        if self.offload:
            for tensor in chain(self.policy.module.parameters(), self.policy.module.buffers()):
                tensor.data = tensor.data.to(device)


def _store(trajectory: Trajectory, scores: Scores) -> None:
    trajectory.teacher_logprobs_R = scores["logprobs"]
    trajectory.teacher_support_RK = scores.get("support")
    trajectory.teacher_support_logprobs_RK = scores.get("support_logprobs")
    trajectory.teacher_full_RV = scores.get("full")
