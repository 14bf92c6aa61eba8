"""Partitions, the gate, and other factors of the tokens' weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section
from megatron_bpdg.config.user import ByName, UserClass


class Fixed(Section):
    """Blocks of `size` response tokens, counted from the first response token."""

    name: Literal["fixed"]
    size: int = Field(64, ge=1)


class Newline(Section):
    """Spans that end at newlines; short ones are merged forward, long ones cut."""

    name: Literal["newline"]
    min_size: int = Field(8, ge=1)
    max_size: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Newline:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} exceeds max_size {self.max_size}")
        return self


class TokenPartition(Section):
    name: Literal["token"]


class SequencePartition(Section):
    name: Literal["sequence"]


PartitionConfig = Annotated[Fixed | Newline | TokenPartition | SequencePartition | UserClass, ByName()]


class GateConfig(Section):
    """Blockwise policy-drift gate (arXiv 2606.24084)."""

    partition: PartitionConfig = Fixed(name="fixed")
    tau: float = Field(1.0, ge=0.0, description="gate = exp(-tau * block drift); 0 turns it into a constant")
    aggregator: Literal["abs_mean", "mean_abs", "rms", "k3"] = Field(
        "abs_mean", description="block drift from token drifts d: |mean d| (paper), mean |d|, rms d, mean(e^d-1-d)"
    )
    unit_mean: Literal["global", "sequence", "microbatch"] = Field(
        "global", description="scope of the unit-mean normalisation; global does not depend on the layout"
    )
    clip_min: float = Field(0.0, ge=0.0, le=1.0, description="lower bound on the raw gate; 0: off")


class DriftGate(GateConfig):
    """The gate as one of several weights."""

    name: Literal["drift_gate"]


WeightConfig = Annotated[DriftGate | UserClass, ByName()]
