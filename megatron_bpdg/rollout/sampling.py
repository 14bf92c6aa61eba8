"""Drawing tokens so that a sample depends on its own seed alone.

Each response has its own stream of uniforms and each token is drawn by inverting the cumulative distribution, so the
result does not depend on which other responses share the batch, nor on how many ranks share the work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Probabilities are summed as whole multiples of 1 / _UNIT: exact, so that no order of summation gives other samples. A
# GPU adds floats in whatever order its blocks finish. Sums stay below 2^53, where float64 knows every integer.
_UNIT = 2**52


def uniforms(seeds: list[int], length: int) -> Tensor:
    """``[len(seeds), length]`` float64 in [0, 1), row r from seed r alone."""
    return torch.stack(
        [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def sample_seed(seed: int, *path: int) -> int:
    """A 63-bit seed for one response, from the run's seed and its place (step, problem, sample)."""
    value = seed
    for part in path:
        # splitmix64 finaliser: neighbouring inputs give unrelated streams.
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample one id per row; log-probs refer to the *full* distribution at `temperature`, whatever top_p cuts off.

    Args:
        logits_BV: float, unscaled.
        uniform_B: float64 in [0, 1).
        top_p: keep the fewest most likely ids that together reach this mass, then renormalise.

    Returns:
        (ids int64 ``[B]``, log-probs float32 ``[B]``).
    """
    logprobs_BV = (logits_BV.float() / temperature).log_softmax(-1)
    order_BV = None
    if top_p == 1.0:
        mass_BV = _mass(logprobs_BV)
    else:
        sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = _mass(sorted_BV)
        before_BV = mass_BV.cumsum(-1) - mass_BV
        mass_BV = torch.where(before_BV < math.ceil(top_p * _UNIT), mass_BV, 0)
    cdf_BV = mass_BV.cumsum(-1)
    target_B = (uniform_B.to(cdf_BV.device) * cdf_BV[:, -1]).long()
    # right=True skips ids of probability zero, which share their predecessor's cumulative value.
    choice_B = torch.searchsorted(cdf_BV, target_B[:, None], right=True)[:, 0].clamp(max=cdf_BV.shape[1] - 1)
    ids_B = choice_B if order_BV is None else order_BV.gather(1, choice_B[:, None])[:, 0]
    return ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0]


def _mass(logprobs_BV: Tensor) -> Tensor:
    return logprobs_BV.double().exp_().mul_(_UNIT).long()
