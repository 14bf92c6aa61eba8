"""The model that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section


class Model(Section):
    """A Qwen3 model: either a checkpoint (HF directory or Megatron torch_dist) or fresh weights for a shape."""

    checkpoint: Path | None = Field(None, description="HF directory (config.json + safetensors) or a bpdg checkpoint")
    init: Path | None = Field(None, description="HF config.json whose shape gets fresh seeded weights")
    tokenizer: Path | None = Field(None, description="HF tokenizer directory; default: the checkpoint's own")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="compute dtype of weights and activations")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.checkpoint is None) == (self.init is None):
            raise ValueError("give exactly one of `checkpoint` (existing weights) and `init` (a config.json)")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("`init` has no tokenizer of its own: set `tokenizer` to an HF tokenizer directory")
        return self
