"""Where metrics go beside the run directory."""

from __future__ import annotations

from pydantic import Field

from megatron_bpdg.config.section import Section


class Logging(Section):
    tensorboard: bool = True
    wandb: str | None = Field(None, description="W&B project; needs the [wandb] extra")
