"""Whether engines have the weights that they were sent, from what they say about a text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_bpdg.rollout.engine import Probe
from megatron_bpdg.serving.http.client import Server, ServerError, ServerUnavailable
from megatron_bpdg.serving.sglang.answers import ask_scores

_TIMEOUT_S = 60.0


async def check_probe(
    urls: Sequence[str], probe: Probe, vocab_size: int, api_key: str | None
) -> tuple[dict[str, str], list[str]]:
    """Server -> why it did not answer the probe text, and what is wrong with the answers of the others."""
    unanswered: dict[str, str] = {}
    wrong: list[str] = []

    async def check(url: str) -> None:
        async with Server(url, _TIMEOUT_S, api_key) as server:
            try:
                texts = [(probe.ids[:1], probe.ids[1:])]
                (scored,) = await ask_scores(server, texts, top_k=0, vocab_size=vocab_size)
                difference = (scored.logprobs_R - probe.logprobs_T).abs()
            except ServerUnavailable as error:
                unanswered[url] = f"no answer to the probe text: {error}"
                return
            except ServerError as error:
                wrong.append(f"{url} does not answer the probe text: {error}")
                return
        if not float(difference.mean()) <= probe.tolerance:
            wrong.append(
                f"{url} does not answer as the weights it was sent: log-probs of the probe text differ by "
                f"{float(difference.mean()):.3g} nats on average (at most {float(difference.max()):.3g}), allowed "
                f"{probe.tolerance:g} (rollout.weight_sync.probe_tolerance); check its model and --dtype"
            )

    await asyncio.gather(*(check(url) for url in urls))
    return unanswered, wrong


async def weights_are(url: str, version: str, api_key: str | None) -> bool:
    """Whether a server can be asked and calls its weights `version`."""
    async with Server(url, _TIMEOUT_S, api_key) as server:
        try:
            return await server.weight_version() == version
        except ServerError:
            return False
