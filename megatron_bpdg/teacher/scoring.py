"""What a Megatron model says about sampled responses: log-probs, top-K supports, whole distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bpdg.data.batch import MicroBatch
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.policy import MegatronPolicy, to_batches
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.sequence import gather_tokens

Scores = dict[str, Tensor]
"""Per response: `logprobs` [R], and as asked for `support` [R, K], `support_logprobs` [R, K], `full` [R, V_local]."""


def score(
    policy: MegatronPolicy,
    micro_batches: Sequence[Sequence[Trajectory]],
    needs: TeacherNeeds,
    temperature: float,
    store: Callable[[Trajectory, Scores], None],
) -> None:
    """Run every response through the model and hand each its scores (on the last pipeline stage's ranks only).

    The results are whole on each of these ranks, except `full`, which stays sharded over the vocabulary.

    Args:
        micro_batches: as they are to be batched; all ranks of a replica pass the same.
        temperature: divides the logits, as it did when the responses were sampled.
        store: where each response's scores go, tensors on the host.
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
            store(trajectory, {name: parts[row] for name, parts in split.items()})
