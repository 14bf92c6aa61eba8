"""pass@k on held-out problems."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.config.section import Section


class Evaluation(Section):
    """pass@k on held-out problems (Chen et al. 2021), with paired bootstrap intervals over problems."""

    data: dict[str, Path] = Field(default_factory=dict, description="name -> .parquet or .jsonl")
    every: int = Field(0, ge=0, description="evaluate every N steps; 0: only before and after")
    samples: int = Field(8, ge=1, description="responses per problem (n of pass@k)")
    k: list[int] = Field(default_factory=lambda: [1, 8])
    sampling: Sampling = Sampling()
    limit: int | None = Field(None, ge=1, description="use only the first N problems of each file")

    @model_validator(mode="after")
    def _k_fits(self) -> Evaluation:
        if too_large := [k for k in self.k if not 1 <= k <= self.samples]:
            raise ValueError(f"k {too_large} outside 1..samples ({self.samples})")
        return self
