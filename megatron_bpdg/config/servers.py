"""SGLang servers, as the sections `teacher` and `rollout` name them."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section


class Servers(Section):
    """SGLang servers of one role, and how patient to be with them."""

    urls: list[str] = Field(min_length=1, description="http://host:port of each server, or of an sglang router")
    concurrency: int = Field(256, ge=1, description="requests in flight per URL and data-parallel replica")
    timeout_s: float = Field(1800.0, gt=0.0, description="seconds one request may take")
    attempts: int = Field(4, ge=1, description="tries of one request, over all servers, before the run stops")
    backoff_s: float = Field(1.0, gt=0.0, description="pause after a failure; doubles each time, to at most 30 s")
    recovery_s: float = Field(600.0, gt=0.0, description="how long to wait for a server when none is left")
    api_key_env: str | None = Field(None, description="environment variable with the servers' API key")

    @model_validator(mode="after")
    def _urls(self) -> Servers:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"url {url!r} should start with http:// or https://")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError(f"urls {self.urls} has a URL twice")
        return self
