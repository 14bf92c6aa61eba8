"""Local support matching on the teacher's top-K ids (Teacher-TopK / LSM, arXiv 2603.25562).

With both sides renormalised on the support S, ``p = softmax(z_S)`` and ``q = softmax(u_S)``, the reverse KL
``l = sum_S p (log p - log q)`` has the gradient ``dl/dz_v = p_v (log(p_v / q_v) - l)`` for v in S and zero elsewhere:
it needs K student logits per position and nothing of the log-sum-exp.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bpdg.objectives.divergence import Divergence
from megatron_bpdg.objectives.vocabulary import VocabOps


def local_support_loss(
    student: VocabOps,
    support_NK: Tensor,
    teacher_logprobs_nK: Tensor,
    divergence: Divergence,
    *,
    outside: Literal["renormalise", "tail_bucket"] = "renormalise",
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Per-token divergence on a local support, ``[n]``.

    Args:
        student: bound to the student's logits of N positions.
        support_NK: teacher's ids, int64 ``[N, K]``, replicated.
        teacher_logprobs_nK: the teacher's log-probs of those ids, this rank's rows, float ``[n, K]``.
        divergence: see `divergence.py`.
        outside: `renormalise` both sides on the support (what lies outside does not exist), or keep the mass outside
            as one `tail_bucket`.
        extra: one more outcome per position, the sampled token: (ids ``[N]``, teacher's log-probs ``[n]``). It is
            left out where the support already has it.
    """
    if extra is None:
        logits_nK = student.gather(support_NK)
    else:
        extra_N, extra_logprob_n = extra
        logits_nK = student.gather(torch.cat([support_NK, extra_N[:, None]], dim=1))
        teacher_logprobs_nK = torch.cat([teacher_logprobs_nK, extra_logprob_n[:, None]], dim=1)
        duplicate_n1 = student.rows((support_NK == extra_N[:, None]).any(1, keepdim=True))
        drop_nK = F.pad(duplicate_n1, (support_NK.shape[1], 0))
        logits_nK = logits_nK.masked_fill(drop_nK, -torch.inf)
        teacher_logprobs_nK = teacher_logprobs_nK.masked_fill(drop_nK, -torch.inf)

    teacher_logprobs_nK = teacher_logprobs_nK.to(logits_nK.dtype)
    if outside == "renormalise":
        log_pi, log_q = logits_nK.log_softmax(-1), teacher_logprobs_nK.log_softmax(-1)
    else:
        log_pi, log_q = logits_nK - student.logsumexp()[:, None], teacher_logprobs_nK
        # Of the support's own ids: with the sample appended, K + 1 columns may still be K ids.
        if support_NK.shape[1] < student.vocab_size:
            log_pi, log_q = (torch.cat([x, log_rest(x)[:, None]], dim=1) for x in (log_pi, log_q))
    return divergence(log_pi, log_q, lambda terms: terms.sum(-1))


def log_rest(logprobs_nK: Tensor) -> Tensor:
    """log(1 - sum_K p), ``[n]``: the mass of everything else, floored at the dtype's resolution."""
    covered = logprobs_nK.exp().sum(-1)
    return (1.0 - covered).clamp(min=torch.finfo(covered.dtype).eps).log()
