"""Sampled-token OPD: a clipped policy gradient whose advantage is the teacher's log-ratio (arXiv 2603.25562)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Beyond it exp would overflow, and a clipped-away infinity has a NaN gradient.
_MAX_LOG_RATIO = 20.0


def sampled_token_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    teacher_logprobs_N: Tensor,
    *,
    advantage: Literal["behaviour", "online"] = "behaviour",
    advantage_clamp: float | None = None,
    clip: float = 0.2,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """Per-token loss ``[N]``; the gradient flows through `logprobs_N` only.

    ``A = log q - log pi_old`` (behaviour) or ``log q - sg(log pi)`` (online), then PPO's clipped surrogate on
    ``r = pi / pi_old`` with the dual clip of Ye et al. 2020 for negative advantages. No discounting.
    ``log r`` is bounded at 20, far outside any clip; without a dual clip, a token beyond it has no gradient.

    Args:
        logprobs_N: current student, float ``[N]``.
        old_logprobs_N: behaviour policy, float ``[N]``.
        teacher_logprobs_N: teacher, float ``[N]``.
        advantage_clamp: bound on |A| in nats.
        clip: PPO's epsilon.
        dual_clip: bound c > 1 on ``-A r`` in units of -A, for A < 0; None: off.
    """
    baseline_N = {"behaviour": old_logprobs_N, "online": logprobs_N}[advantage]
    advantage_N = (teacher_logprobs_N - baseline_N).detach()
    if advantage_clamp is not None:
        advantage_N = advantage_N.clamp(-advantage_clamp, advantage_clamp)
    ratio_N = torch.exp((logprobs_N - old_logprobs_N.detach()).clamp(max=_MAX_LOG_RATIO))
    loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1.0 - clip, 1.0 + clip))
    if dual_clip is not None:
        loss_N = torch.where(advantage_N < 0, torch.minimum(loss_N, -advantage_N * dual_clip), loss_N)
    return loss_N
