"""Where the teacher's signal comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section
from megatron_bpdg.config.servers import Servers


class Teacher(Section):
    """Where the teacher's signal comes from. Its top-K supports are never touched by the gate."""

    engine: Literal["megatron", "sglang"] = Field(
        "megatron", description="in the trainer's processes (megatron), or servers (sglang)"
    )
    checkpoint: Path | None = Field(
        None,
        description="HF directory or bpdg checkpoint; engine: sglang reads its config.json and tokenizer only, and "
        "where it is null, those of the servers' model path",
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    offload: bool = Field(False, description="engine: megatron: keep the weights in host memory between uses")
    servers: Servers | None = Field(None, description="engine: sglang: where the teacher is served")
    tokens_per_request: int = Field(65_536, ge=1, description="engine: sglang: prompt and response tokens per request")
    payload_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="engine: sglang: width in which the teacher's log-probs are kept; ids are int32"
    )

    @model_validator(mode="after")
    def _engine_fits(self) -> Teacher:
        other = {
            "megatron": ["servers", "tokens_per_request", "payload_dtype"],
            "sglang": ["offload", "dtype"],
        }[self.engine]
        if unused := self.changed(other):
            raise ValueError(f"engine: {self.engine} does not use {', '.join(unused)}: remove it")
        if self.engine == "megatron" and self.checkpoint is None:
            raise ValueError("engine: megatron needs `checkpoint`")
        if self.engine == "sglang" and self.servers is None:
            raise ValueError("engine: sglang needs `servers: {urls: [...]}`; start them with `bpdg serve teacher`")
        return self
