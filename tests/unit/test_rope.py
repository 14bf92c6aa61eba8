"""Scaled rotary frequencies against HF transformers' own, at the sizes of published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bpdg.models.rope import frequencies, rope_scaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
SCALINGS: dict[str, dict[str, Any]] = {
    "qwen3": YARN,
    "attention factor": YARN | {"attention_factor": 1.25},
    "mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2},
    "betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "no truncation": YARN | {"truncate": False},
    "factor 1": YARN | {"factor": 1.0},
    "llama 3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_equal_to_transformers(name: str, theta: float) -> None:
    fields = SCALINGS[name]
    config = Qwen3Config(head_dim=128, rope_parameters=fields | {"rope_theta": theta}, max_position_embeddings=131_072)
    expected, attention = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, torch.device("cpu"))
    scaling = rope_scaling(fields)
    assert scaling is not None
    torch.testing.assert_close(scaling.frequencies(128, theta), expected, rtol=1e-6, atol=0)
    assert scaling.attention == pytest.approx(attention, rel=1e-12)
    if fields["factor"] > 1:
        assert not torch.allclose(expected, frequencies(128, theta))


def test_unscaled() -> None:
    assert rope_scaling(None) is None
    assert frequencies(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
