"""What a Megatron model says about sampled responses, and a teacher that is one, in the student's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bpdg.data.batch import MicroBatch
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.policy import MegatronPolicy, to_batches
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.sequence import gather_tokens

Scores = dict[str, Tensor]
"""Per response: `logprobs` [R], and as asked for `support` [R, K], `support_logprobs` [R, K], `full` [R, V_local]."""


class MegatronTeacher:
    """Scores responses with a frozen Megatron model.

    Args:
        policy: the teacher's model, weights loaded.
        needs: what the objective reads.
        temperature: the sampling temperature; both sides of every loss refer to it.
        offload: keep the weights in host memory between uses.
    """

    def __init__(self, policy: MegatronPolicy, needs: TeacherNeeds, temperature: float, *, offload: bool) -> None:
        self.policy, self.needs, self.temperature, self.offload = policy, needs, temperature, offload
        policy.module.requires_grad_(False)
        self._move_to(torch.device("cpu"))

    def prefetch(self, trajectories: Sequence[Trajectory]) -> None:
        """Nothing to do: this teacher works in the trainer's own time."""

    def close(self) -> None:
        """Nothing to let go of."""

    def score(self, micro_batches: Sequence[Sequence[Trajectory]]) -> None:
        """Fill in the teacher fields of every trajectory."""
        self._move_to(default_device())
        for trajectory, scores in score(self.policy, micro_batches, self.needs, self.temperature):
            trajectory.teacher_logprobs_R = scores["logprobs"]
            trajectory.teacher_support_RK = scores.get("support")
            trajectory.teacher_support_logprobs_RK = scores.get("support_logprobs")
            trajectory.teacher_full_RV = scores.get("full")
        self._move_to(torch.device("cpu"))

    def _move_to(self, device: torch.device) -> None:
        if self.offload:
            for tensor in chain(self.policy.module.parameters(), self.policy.module.buffers()):
                tensor.data = tensor.data.to(device)


def score(
    policy: MegatronPolicy,
    micro_batches: Sequence[Sequence[Trajectory]],
    needs: TeacherNeeds,
    temperature: float,
) -> Iterator[tuple[Trajectory, Scores]]:
    """Every response with its scores, tensors on the host; on the ranks of the last pipeline stage only.

    All ranks have to iterate. The scores are whole on each of them, but for `full`, whose vocabulary stays sharded.

    Args:
        micro_batches: as they are to be batched; all ranks of a replica pass the same.
        temperature: divides the logits, as it did when the responses were sampled.
    """

    def read(hidden_SBH: Tensor, batch: MicroBatch) -> Scores:
        ops = policy.vocab_ops(hidden_SBH, batch, temperature, scattered=False)
        scores: Scores = {}
        if needs.top_k:
            # Asked for first: one sweep over the vocabulary then serves everything.
            values_NK, ids_NK = ops.topk(needs.top_k)
            scores |= {"support": ids_NK.int(), "support_logprobs": values_NK - ops.logsumexp()[:, None]}
        scores["logprobs"] = ops.logprob(batch.sampled_N)
        if needs.full:
            log_p_NV = ops.log_softmax()
            # Padded columns keep the shards of all ranks equally wide; they have probability zero.
            width = len(policy.unwrapped.head_weight())
            scores["full"] = F.pad(log_p_NV, (0, width - log_p_NV.shape[1]), value=-torch.inf)
        mine = batch.token_N[batch.real_N], batch.num_tokens, policy.mesh.context
        return {name: gather_tokens(tensor[batch.real_N], *mine).cpu() for name, tensor in scores.items()}

    for trajectories, scores in zip(micro_batches, policy.forward(to_batches(micro_batches, policy), read)):
        lengths = [len(t.response_ids) for t in trajectories]
        split = {name: tensor.split(lengths) for name, tensor in scores.items()}
        for row, trajectory in enumerate(trajectories):
            yield trajectory, {name: parts[row] for name, parts in split.items()}
