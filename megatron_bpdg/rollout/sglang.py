"""Rollouts from SGLang servers.

One rank of each data-parallel replica (the leader) talks to the servers; its requests run in the background while the
ranks meet every second to hand round what has finished. A server that lost its weights (it was restarted) gets them
again at such a meeting, before it serves again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count

import torch

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.config.servers import Servers
from megatron_bpdg.parallel.mesh import Mesh
from megatron_bpdg.parallel.together import everyone, on_first
from megatron_bpdg.rollout.engine import Finished, Probe, Request, Response
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import MalformedAnswer, Server, ServerError, ServerUnavailable, ask_each
from megatron_bpdg.serving.http.pool import LONGEST_PAUSE_S, ServerPool, ServingError, StaleWeights, State
from megatron_bpdg.serving.http.ready import healthy, resume
from megatron_bpdg.serving.sglang.answers import Generated, ask_scores, read_generated
from megatron_bpdg.serving.sglang.weights import WeightSync, WeightSyncError
from megatron_bpdg.serving.sglang.weights.base import Weights

# How long the ranks wait before they meet again when nothing has finished.
_MEETING_S = 1.0


class SGLangEngine:
    """`RolloutEngine` on SGLang servers.

    Args:
        servers: addresses and patience.
        sync: carries the weights over.
        sync_urls: the engines that get the weights; other than the servers' only where those are routers.
        mesh: where this rank stands; one rank of each data-parallel replica talks for it.
        vocab_size: ids outside it are refused before they reach a server, which they would kill.
        end_ids: tokens that end a response. A server knows those of its own files, which may lack some.
        api_key: bearer token, or None.
    """

    def __init__(
        self,
        servers: Servers,
        sync: WeightSync,
        *,
        sync_urls: Sequence[str] | None,
        mesh: Mesh,
        vocab_size: int,
        end_ids: Sequence[int] = (),
        api_key: str | None = None,
    ) -> None:
        self.servers, self.sync, self.end_ids = servers, sync, list(end_ids)
        self.mesh, self.vocab_size = mesh, vocab_size
        self.sync_urls = [url.rstrip("/") for url in sync_urls or servers.urls]
        self.version = -1
        self.retries = 0
        # Versions on the wire carry the run's name: a server left over from another run must not pass for ours.
        self.run = f"bpdg-{on_first(lambda: uuid.uuid4().hex[:8])}"
        self._api_key = api_key
        self._weights: Weights | None = None
        self._probe: Probe | None = None
        # Engines whose last update failed; what they call their weights says nothing then.
        self._unsure: set[str] = set()
        # Leaders ask for responses; the first rank of all sends the weights and checks them.
        self._background = Background("bpdg-rollout")
        self.pool = ServerPool(servers, "rollout", api_key, self._has_our_weights)

    # --- weights ---------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Weights, version: int, probe: Probe | None) -> None:
        """Send the weights to every engine that can take them; where none can, again when one is healthy.

        Raises:
            ServingError: no engine took them in `attempts` tries, or none was healthy for `recovery_s`.
            WeightSyncError: an engine that took them does not answer as they do (`probe`).
        """
        self._weights, self._probe, self.version = weights, probe, version
        self._push(self.sync_urls)

    def _push(self, urls: Sequence[str]) -> None:
        self._unsure |= set(urls)
        for tries in count(1):
            failed = self._send(urls)
            if not set(failed) >= set(self.sync_urls):
                break
            if tries >= self.servers.attempts or not self._one_is_back(tries):
                listed = "\n".join(f"  {url}: {message}" for url, message in failed.items())
                raise ServingError(
                    f"rollout: no engine took the weights of step {self.version} (tries: {tries}; "
                    f"rollout.servers.attempts, rollout.servers.recovery_s):\n{listed}"
                )
        self._unsure = self._unsure - set(urls) | set(failed)
        if not self.mesh.is_leader:
            return
        if set(self.sync_urls) == set(self.pool.urls):
            states = {url: State.DOWN if url in failed else State.SERVING for url in urls}
        else:
            # A router serves as long as one engine behind it does, but not where it may choose one that failed and yet
            # calls its weights by the name of the right ones.
            named = self._background.run(ask_each(failed, self._api_key, Server.weight_version))
            mistakable = self.wire_version(self.version) in named.values()
            states = dict.fromkeys(self.pool.urls, State.STALE if mistakable else State.SERVING)
        self._background.run(self.pool.set_states(states, failed))

    def _send(self, urls: Sequence[str]) -> dict[str, str]:
        """Engine -> why it cannot be said to have the weights. Collective, the same on every rank."""
        assert self._weights is not None
        try:
            self.sync.push(self._weights, self.wire_version(self.version), urls)
            failed: dict[str, str] = {}
        except WeightSyncError as error:
            failed = error.failed

        took = [url for url in urls if url not in failed]
        return failed | on_first(lambda: self._background.run(self._probed(took)))

    async def _probed(self, urls: Sequence[str]) -> dict[str, str]:
        """Engine -> why it did not answer the probe text; raises WeightSyncError where one answers otherwise."""
        if (probe := self._probe) is None:
            return {}

        async def score(server: Server) -> torch.Tensor:
            (scored,) = await ask_scores(server, [(probe.ids[:1], probe.ids[1:])], top_k=0, vocab_size=self.vocab_size)
            return scored.logprobs_R

        unanswered: dict[str, str] = {}
        wrong: list[str] = []
        for url, answer in (await ask_each(urls, self._api_key, score, timeout_s=60.0)).items():
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
        if wrong:
            raise WeightSyncError("\n".join(wrong))
        return unanswered

    def _one_is_back(self, tries: int) -> bool:
        """Whether an engine is healthy, within `recovery_s` from now. Collective; the ranks meet at every look."""
        deadline = time.monotonic() + self.servers.recovery_s
        time.sleep(min(self.servers.backoff_s * 2 ** (tries - 1), LONGEST_PAUSE_S))

        def look() -> bool | None:
            # One that did not hear the end of the update is still paused.
            self._background.run(resume(self.sync_urls, self._api_key))
            found = self._background.run(healthy(self.sync_urls, self._api_key))
            return True if found else False if time.monotonic() > deadline else None

        while (answer := on_first(look)) is None:
            time.sleep(_MEETING_S)
        return answer

    def wire_version(self, version: int) -> str:
        return f"{self.run}-{version}"

    def _step_of(self, wire_version: str) -> int | None:
        """The trainer's step of a version on the wire; None for weights that are not this run's."""
        run, _, step = wire_version.rpartition("-")
        return int(step) if run == self.run and step.isdecimal() else None

    async def _has_our_weights(self, server: Server) -> bool:
        return server.url not in self._unsure and await server.weight_version() == self.wire_version(self.version)

    # --- sampling --------------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> SGLangStream:
        """Start this replica's share of the requests.

        Raises:
            RuntimeError: no weights have been loaded yet.
            ValueError: a prompt has an id outside the vocabulary.
        """
        if self.version < 0:
            raise RuntimeError("SGLangEngine.stream before load_weights: the servers' weights are unknown")
        for request in requests:
            if bad := [token for token in request.prompt_ids if not 0 <= token < self.vocab_size]:
                raise ValueError(f"prompt with token id {bad[0]}, outside the vocabulary of {self.vocab_size}")
        return SGLangStream(self, requests, sampling)

    def close(self) -> None:
        self._background.run(self.pool.close())
        self._background.close()
        self.sync.close()

    async def sample(self, job: _Job, sampling: Sampling) -> Response:
        """Sample one response to its end; goes on where others aborted it, ends early where `job` is cancelled."""
        response = job.request.started or Response.empty()
        while response.cut_off and not job.interrupted:
            response = await self.pool.call(partial(self._go_on, job=job, begun=response, sampling=sampling), job.name)
        return response

    async def _go_on(self, server: Server, job: _Job, begun: Response, sampling: Sampling) -> Response:
        """Ask a server for all that is left of a response."""
        if job.interrupted:
            return begun
        left = sampling.max_new_tokens - len(begun.ids)
        before = self.version
        request_id = f"{self.run}-{uuid.uuid4().hex}"
        input_ids = job.request.prompt_ids + begun.ids
        body = {
            "rid": request_id,
            "input_ids": input_ids,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": left,
                "stop_token_ids": self.end_ids,
                # Heard only by servers in deterministic mode.
                "sampling_seed": job.request.seed % 2**31,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
        }
        job.asked = (server, request_id)
        try:
            content = await server.post_raw("/generate", body)
        except ServerUnavailable:
            # It may only have been too slow: whatever it still does for this request is not wanted any more.
            await _abort(server, request_id)
            raise
        finally:
            job.asked = None
        where = f"{server.url}/generate, {job.name}"
        answer = read_generated(
            content, prompt=len(input_ids), max_new_tokens=left, vocab_size=self.vocab_size, where=where
        )
        if answer.finish == "abort" and not answer.ids and not job.interrupted:
            # Counted as a failed try: a server that does nothing else would be asked again for ever.
            raise MalformedAnswer(f"{where}: aborted before its first token, and not by this run")
        return Response(
            begun.ids + answer.ids,
            torch.cat([begun.logprobs, answer.logprobs_R]),
            finished=answer.finish == "stop",
            version_R=torch.cat([begun.version_R, self._versions(answer, before, where)]),
            cut_off=answer.finish == "abort" and len(answer.ids) < left,
        )

    def _versions(self, answer: Generated, before: int, where: str) -> torch.Tensor:
        """Step of each token's weights, int32 ``[R]``."""
        # Without spans all that is known is what was loaded before and what is now: count the older for every token.
        spans = answer.spans or [(answer.version, 0, len(answer.ids))]
        steps = [self._step_of(version) for version, _, _ in spans]
        if any(step is None or not before <= step <= self.version for step in steps):
            raise StaleWeights(
                f"{where}: sampled by weights {[v for v, _, _ in spans]}, not {self.wire_version(before)}"
            )
        if answer.spans is None:
            steps = [before]
        lengths = torch.tensor([end - start for _, start, end in spans])
        return torch.tensor(steps, dtype=torch.int32).repeat_interleave(lengths)


@dataclass
class _Job:
    """A request under way; `asked` while a server works on it."""

    index: int
    request: Request
    interrupted: bool = False
    asked: tuple[Server, str] | None = None

    @property
    def name(self) -> str:
        return f"response {self.index}"


class SGLangStream:
    """`RolloutStream` of an `SGLangEngine`."""

    def __init__(self, engine: SGLangEngine, requests: Sequence[Request], sampling: Sampling) -> None:
        self.engine = engine
        self._left = len(requests)
        self._running: dict[Future[Response], _Job] = {}
        if engine.mesh.is_leader:
            for index, request in enumerate(requests):
                if engine.mesh.owns(index):
                    job = _Job(index, request)
                    self._running[engine._background.submit(engine.sample(job, sampling))] = job

    def __iter__(self) -> Iterator[Finished]:
        while self._left:
            if finished := self._meet():
                yield finished

    def interrupt(self) -> Finished:
        for job in self._running.values():
            job.interrupted = True
        leftovers: Finished = []
        while self._left:
            # Again at every meeting: a server ignores an abort that overtakes its request.
            asked = [job.asked for job in self._running.values()]
            for abort in [self.engine._background.submit(_abort(*request)) for request in asked if request]:
                abort.result()
            leftovers += self._meet()
        return leftovers

    def _meet(self) -> Finished:
        """Hand round what has finished since the last meeting; serve engines that lack the weights.

        Raises:
            ServingError: the same on every rank, when a leader's servers are past helping.
        """
        engine = self.engine
        mine: Finished = []
        error: str | None = None
        if self._running:
            # A moment for those that finish close together.
            deadline = time.monotonic() + _MEETING_S
            wait(self._running, _MEETING_S, FIRST_COMPLETED)
            wait(self._running, min(0.05, max(0.0, deadline - time.monotonic())))
        without_weights = engine.pool.in_state(State.STALE) if self._running else []
        for future in [future for future in self._running if future.done()]:
            job = self._running.pop(future)
            try:
                mine.append((job.index, future.result()))
            except (ServerError, ServingError) as failure:
                error = str(failure)
        finished, errors, without, retries = zip(*everyone((mine, error, without_weights, engine.pool.retries)))
        engine.retries = sum(retries)
        if any(errors):
            for future in self._running:
                future.cancel()
            raise ServingError(next(filter(None, errors)))
        if lacking := sorted(set(chain(*without))):
            engine._push(lacking if set(lacking) <= set(engine.sync_urls) else engine.sync_urls)
        together = list(chain(*finished))
        self._left -= len(together)
        return together


async def _abort(server: Server, request_id: str) -> None:
    # Where the server is in trouble, the pool knows already; the request is sent elsewhere either way.
    with suppress(ServerError):
        await server.post("/abort_request", {"rid": request_id}, timeout_s=5.0)
