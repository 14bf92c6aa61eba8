"""Objectives: what is asked of the teacher, and what becomes of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_bpdg.config.section import Section
from megatron_bpdg.config.user import ByName, UserClass


class SampledToken(Section):
    """Policy-gradient OPD on the sampled token (arXiv 2603.25562)."""

    name: Literal["sampled_token"]
    advantage: Literal["behaviour", "online"] = Field(
        "behaviour", description="log q - log pi_old (behaviour) or log q - sg(log pi) (online)"
    )
    advantage_clamp: float | None = Field(None, gt=0.0, description="clamp the advantage to +- this many nats")
    clip: float = Field(0.2, gt=0.0, lt=1.0, description="PPO clip on pi/pi_old")
    dual_clip: float | None = Field(3.0, gt=1.0, description="dual-clip bound for negative advantages; null: off")


class TeacherTopK(Section):
    """Local support matching on the teacher's top-K ids (arXiv 2603.25562, Teacher-TopK/LSM)."""

    name: Literal["lsm"]
    top_k: int = Field(32, ge=1)
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    jsd_beta: float = Field(0.5, gt=0.0, lt=1.0)
    outside: Literal["renormalise", "tail_bucket"] = Field(
        "renormalise", description="renormalise both sides on the support, or keep the rest as one extra bucket"
    )
    append_sampled: bool = Field(False, description="add the sampled token to the support where it is outside")


class FullVocabulary(Section):
    """A divergence over the whole vocabulary (GKD, Agarwal et al. 2024)."""

    name: Literal["forward_kl", "reverse_kl", "jsd"]
    jsd_beta: float = Field(0.5, gt=0.0, lt=1.0)


class SupervisedObjective(Section):
    """Negative log-likelihood of given responses (kind: sft)."""

    name: Literal["sft"]


ObjectiveConfig = Annotated[SampledToken | TeacherTopK | FullVocabulary | SupervisedObjective | UserClass, ByName()]
