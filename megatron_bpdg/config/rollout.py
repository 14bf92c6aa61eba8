"""How responses are sampled, and how the weights get to the sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section
from megatron_bpdg.config.servers import Servers


class Sampling(Section):
    """How responses are drawn. Log-probs always refer to the full distribution at `temperature`."""

    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(16384, ge=1)


class WeightSync(Section):
    """How the student's weights get into SGLang servers after every step."""

    method: Literal["disk", "tensor", "distributed"] = Field(
        "disk",
        description="disk: through a shared file system; tensor: shared memory of engines on the trainer's own "
        "devices; distributed: a collective group of the trainer's first rank and the engines",
    )
    urls: list[str] | None = Field(None, description="engines behind a router; null: rollout.servers.urls")
    directory: Path | None = Field(None, description="disk: shared directory; null: `sampler_weights` in the output")
    keep: int = Field(2, ge=1, description="disk: versions that are kept")
    bucket_mb: int = Field(512, ge=1, description="tensor, distributed: megabytes sent at once")
    pause: Literal["retract", "abort"] = Field(
        "retract", description="what the engines do with requests under way: redo their caches, or cut them off"
    )
    master_address: str | None = Field(
        None, description="distributed: the trainer's address; null: the one that leads to the engines"
    )
    master_port: int | None = Field(None, ge=1, le=65_535, description="distributed: null: a free one")
    timeout_s: float = Field(
        600.0,
        gt=0.0,
        le=1500.0,
        description="seconds an engine may take to read its weights (disk) or one bucket, for which all ranks wait; to "
        "pause and go on it has at most 60",
    )
    probe_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="largest mean difference in nats between an engine's and the trainer's log-probs of a probe text "
        "after an update; null: 1e-3 for float32 and 0.1 for bfloat16",
    )


class Rollout(Section):
    """On-policy samples of one step: prompts_per_step x samples_per_prompt responses."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="HF generate in the trainer's processes (embedded), or servers (sglang)"
    )
    prompts_per_step: int = Field(4, ge=1)
    samples_per_prompt: int = Field(8, ge=1)
    sampling: Sampling = Sampling()
    batch_size: int = Field(128, ge=1, description="engine: embedded: sequences decoded at once")
    servers: Servers | None = Field(None, description="engine: sglang: where the student is served")
    weight_sync: WeightSync = WeightSync()
    extra_prompts: int = Field(
        0,
        ge=0,
        description="engine: sglang: prompts sampled beside prompts_per_step; a step takes the groups that finish "
        "first and goes on with the others in the next one (partial rollouts, with mixed weight versions)",
    )

    @model_validator(mode="after")
    def _engine_fits(self) -> Rollout:
        other = {"embedded": ["servers", "weight_sync", "extra_prompts"], "sglang": ["batch_size"]}[self.engine]
        if unused := self.changed(other):
            raise ValueError(f"engine: {self.engine} does not use {', '.join(unused)}: remove it")
        if self.engine == "sglang" and self.servers is None:
            raise ValueError("engine: sglang needs `servers: {urls: [...]}`; start them with `bpdg serve student`")
        return self
