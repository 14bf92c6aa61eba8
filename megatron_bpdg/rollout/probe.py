"""Whether engines have the weights that they were sent, from what they say about a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_bpdg.rollout.engine import Probe
from megatron_bpdg.serving.http.client import Server, ServerError, ServerUnavailable, ask_each
from megatron_bpdg.serving.sglang.answers import ask_scores


async def check_probe(
    urls: Sequence[str], probe: Probe, vocab_size: int, api_key: str | None
) -> tuple[dict[str, str], list[str]]:
    """Server -> why it did not answer the probe text, and what is wrong with the answers of the others."""

    async def score(server: Server) -> Tensor:
        (scored,) = await ask_scores(server, [(probe.ids[:1], probe.ids[1:])], top_k=0, vocab_size=vocab_size)
        return scored.logprobs_R

    unanswered: dict[str, str] = {}
    wrong: list[str] = []
    for url, answer in (await ask_each(urls, api_key, score, timeout_s=60.0)).items():
        if isinstance(answer, ServerUnavailable):
            unanswered[url] = f"no answer to the probe text: {answer}"
            continue
        if isinstance(answer, ServerError):
            wrong.append(f"{url} does not answer the probe text: {answer}")
            continue
        difference = (answer - probe.logprobs_T).abs()
        # Not "greater than": NaN is wrong too.
        if not float(difference.mean()) <= probe.tolerance:
            wrong.append(
                f"{url} does not answer as the weights it was sent: log-probs of the probe text differ by "
                f"{float(difference.mean()):.3g} nats on average (at most {float(difference.max()):.3g}), allowed "
                f"{probe.tolerance:g} (rollout.weight_sync.probe_tolerance); check its model and --dtype"
            )
    return unanswered, wrong
