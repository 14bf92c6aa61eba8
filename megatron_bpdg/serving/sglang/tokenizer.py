"""Whether a server's tokenizer is the trainer's."""

from __future__ import annotations

from typing import Any

import torch

from megatron_bpdg.serving.http.client import MalformedAnswer, Server

# Ids that are compared, spread over the vocabulary.
_SAMPLE = 512


async def check_tokenizer(server: Server, tokenizer: Any) -> None:
    """Compare what the server and the tokenizer make of the same ids.

    Raises:
        ValueError: with examples of ids that they read differently.
        ServerError: the server cannot be asked.
    """
    size = len(tokenizer)
    ids = torch.linspace(0, size - 1, min(size, _SAMPLE)).round().long().unique().tolist()
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
