"""What a server says about itself, and whether its tokenizer is the trainer's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bpdg.parallel.together import on_first
from megatron_bpdg.serving.http.client import MalformedAnswer, Server, ask_each

# Ids by which tokenizers are compared, spread over the vocabulary.
_SAMPLED_IDS = 512


@dataclass(frozen=True)
class ServerFacts:
    """One server.

    Attributes:
        sglang: its version.
        model: path of the weights it serves now.
        weight_version: what it calls them.
        dtype: that it was started with.
        context_length: its model's positions.
        token_limit: longest prompt and response together, in tokens, that it samples whole and scores; None: it does
            not say.
    """

    sglang: str
    model: str
    weight_version: str
    dtype: str
    context_length: int
    token_limit: int | None


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
            token_limit=_token_limit(info),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise MalformedAnswer(f"{server.url}: no SGLang 0.5.23 or newer: {type(error).__name__}: {error}") from error


def served_token_limits(urls: Sequence[str], api_key: str | None) -> dict[str, int]:
    """`ServerFacts.token_limit` of the servers that say it; others, such as routers, are left out. Collective."""

    async def ask(server: Server) -> int | None:
        return _token_limit(await server.get("/server_info"))

    # One that fails is left out here: whoever needs a server that is away says so.
    limits = on_first(lambda: asyncio.run(ask_each(urls, api_key, ask)))
    return {url: limit for url, limit in limits.items() if isinstance(limit, int)}


def _token_limit(info: Any) -> int | None:
    """The smaller of context and KV cache, less what SGLang keeps for itself: a text of this limit is refused."""
    limit = info.get("max_req_input_len") if isinstance(info, dict) else None
    return limit - 1 if isinstance(limit, int) else None


async def check_tokenizer(server: Server, tokenizer: Any) -> None:
    """Compare what the server and the tokenizer make of the same ids.

    Raises:
        ValueError: with examples of ids that they read differently.
        ServerError: the server cannot be asked.
    """
    size = len(tokenizer)
    ids = torch.linspace(0, size - 1, min(size, _SAMPLED_IDS)).round().long().unique().tolist()
    answer = await server.post("/detokenize", {"tokens": [[i] for i in ids], "skip_special_tokens": False})
    texts = answer.get("text") if isinstance(answer, dict) else None
    if not isinstance(texts, list) or len(texts) != len(ids):
        raise MalformedAnswer(f"{server.url}/detokenize: expected {len(ids)} texts; was it started without tokenizer?")
    ours = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    different = [(i, text, own) for i, text, own in zip(ids, texts, ours) if text != own]
    if different:
        i, text, own = different[0]
        raise ValueError(
            f"{server.url} has another tokenizer: {len(different)} of {len(ids)} ids differ, such as {i}, which is "
            f"{text!r} there and {own!r} here; serve a model whose tokenizer is the student's"
        )
