"""Rotary frequencies of models whose context was extended, computed as HF transformers does (`modeling_rope_utils`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Angle per position of each pair of dimensions, ``[head_dim / 2]`` float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): slow pairs are interpolated, fast ones kept, attention sharpened.

    `original_max_position_embeddings` is in tokens, `beta_fast` and `beta_slow` in turns over that many tokens.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention(self) -> float:
        """What queries and keys are both multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, head_dim: int, theta: float) -> Tensor:
        """As the module's `frequencies`, scaled."""

        def pair_with(turns: float) -> float:
            period = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(period) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # as HF does, against a division by zero
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        plain = frequencies(head_dim, theta)
        return plain / self.factor * ramp + plain * (1 - ramp)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: long wavelengths (in tokens) are divided by `factor`, short ones kept, a ramp between."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    attention = 1.0

    def frequencies(self, head_dim: int, theta: float) -> Tensor:
        """As the module's `frequencies`, scaled."""
        plain = frequencies(head_dim, theta)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept


RopeScaling = Yarn | Llama3
# By transformers' name of the type; their fields have transformers' names.
ROPE_SCALINGS: dict[str, type[RopeScaling]] = {"yarn": Yarn, "llama3": Llama3}


def rope_scaling(fields: Mapping[str, Any] | None) -> RopeScaling | None:
    """From the `rope_scaling` of a normalised HF config."""
    if fields is None:
        return None
    return ROPE_SCALINGS[fields["rope_type"]](**{name: fields[name] for name in fields if name != "rope_type"})
