"""What a server says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpdg.serving.client import MalformedAnswer, Server


@dataclass(frozen=True)
class ServerFacts:
    """One server.

    Attributes:
        sglang: its version.
        model: path of the weights it serves now.
        weight_version: what it calls them.
        dtype: that it was started with.
        context_length: longest prompt and response together, in tokens.
    """

    sglang: str
    model: str
    weight_version: str
    dtype: str
    context_length: int


async def server_facts(server: Server) -> ServerFacts:
    """Ask a server.

    Raises:
        ServerError: it cannot be asked, or is no SGLang server as of 0.5.23.
    """
    info = await server.get("/server_info", timeout_s=30.0)
    models = await server.get("/v1/models", timeout_s=30.0)
    model = await server.model_info()
    try:
        return ServerFacts(
            sglang=str(info["version"]),
            model=str(model["model_path"]),
            weight_version=model["weight_version"],
            dtype=str(info["dtype"]),
            context_length=int(models["data"][0]["max_model_len"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise MalformedAnswer(f"{server.url}: no SGLang 0.5.23 or newer: {type(error).__name__}: {error}") from error
