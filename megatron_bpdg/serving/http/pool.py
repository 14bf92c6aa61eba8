"""Several servers that can stand in for each other: bounded concurrency, retries, failover, return of the dead.

A server is *serving*, *down* (until it is healthy again) or *stale* (healthy, but it must get the trainer's weights
before it serves). A request keeps trying, on whichever server serves, until it is answered or its tries are spent; it
is answered at most once, so no sample is lost or counted twice.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from megatron_bpdg.config.servers import Servers
from megatron_bpdg.serving.http.client import Answer, MalformedAnswer, Server, ServerError, ServerUnavailable, ask_each

LONGEST_PAUSE_S = 30.0
_LONGEST_WATCH_S = 5.0
# A server that answers nonsense this often in a row is treated like one that does not answer.
_BAD_ANSWERS = 3


class ServingError(RuntimeError):
    """The servers could not do the work within the configured patience; the message says what failed where."""


class StaleWeights(ServerError):
    """The server answered with weights that are not the ones asked for."""


class State(enum.Enum):
    SERVING = "serving"
    DOWN = "down"
    STALE = "stale"


@dataclass
class _Engine:
    server: Server
    state: State = State.SERVING
    in_flight: int = 0
    bad_answers: int = 0
    error: str = ""
    watch: asyncio.Task[None] | None = None


class ServerPool:
    """The servers of one role. All methods but the properties belong into one event loop.

    Args:
        servers: addresses and patience.
        role: for messages, such as "rollout".
        api_key: bearer token, or None.
        admit: asked of a server that is healthy again: whether it may serve at once, or is stale. May raise
            ServerError (try again later). None: it may.
    """

    def __init__(
        self,
        servers: Servers,
        role: str,
        api_key: str | None = None,
        admit: Callable[[Server], Awaitable[bool]] | None = None,
    ) -> None:
        self.limits, self.role = servers, role
        self._api_key, self._admit = api_key, admit
        self._engines = {
            url: _Engine(Server(url, servers.timeout_s, api_key)) for url in (u.rstrip("/") for u in servers.urls)
        }
        self._changed = asyncio.Condition()
        self._none_since: float | None = None
        self.retries = 0

    @property
    def urls(self) -> list[str]:
        return list(self._engines)

    def in_state(self, state: State) -> list[str]:
        """URLs of the servers that are in this state now."""
        return [url for url, engine in self._engines.items() if engine.state is state]

    async def close(self) -> None:
        for engine in self._engines.values():
            if engine.watch is not None:
                engine.watch.cancel()
            await engine.server.close()

    async def each(self, ask: Callable[[Server], Awaitable[Answer]]) -> dict[str, Answer | ServerError]:
        """What every server says, or how it failed, whatever its state."""
        return await ask_each(self.urls, self._api_key, ask, self.limits.timeout_s)

    async def set_states(self, states: Mapping[str, State], errors: Mapping[str, str] | None = None) -> None:
        """Put servers into states from outside, after a weight update for instance."""
        async with self._changed:
            for url, state in states.items():
                self._set(self._engines[url], state, (errors or {}).get(url, ""))
            self._changed.notify_all()

    async def call(self, ask: Callable[[Server], Awaitable[Answer]], what: str) -> Answer:
        """The answer of some server.

        Args:
            ask: sends the request to a server and checks the answer; may raise ServerError.
            what: for messages.

        Raises:
            RequestRefused: a server refused the request as such.
            ServingError: the tries are spent, or no server came back in time.
        """
        failures: list[str] = []
        pause = self.limits.backoff_s
        while True:
            engine = await self._acquire(what)
            try:
                answer = await ask(engine.server)
            except StaleWeights as error:
                # Not the request's fault and not counted: the server is out until it has the weights.
                await self._report(engine, State.STALE, str(error))
                continue
            except (ServerUnavailable, MalformedAnswer) as error:
                failures.append(str(error))
                engine.bad_answers += 1
                if isinstance(error, ServerUnavailable) or engine.bad_answers >= _BAD_ANSWERS:
                    await self._report(engine, State.DOWN, str(error))
            else:
                engine.bad_answers = 0
                return answer
            finally:
                await self._release(engine)
            if len(failures) >= self.limits.attempts:
                tried = "\n".join(f"  {failure}" for failure in failures)
                raise ServingError(
                    f"{self.role}: {what} failed {len(failures)} times ({self.role}.servers.attempts):\n{tried}"
                )
            self.retries += 1
            await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
            pause *= 2

    async def _acquire(self, what: str) -> _Engine:
        """The least busy serving server, as soon as one has room."""
        async with self._changed:
            while True:
                serving = [engine for engine in self._engines.values() if engine.state is State.SERVING]
                engine = min(serving, key=lambda engine: engine.in_flight, default=None)
                if engine is not None and engine.in_flight < self.limits.concurrency:
                    engine.in_flight += 1
                    return engine
                patience = None
                if self._none_since is not None:
                    patience = self._none_since + self.limits.recovery_s - time.monotonic()
                    if patience <= 0:
                        states = "\n".join(
                            f"  {url}: {engine.state.value}{f' ({engine.error})' if engine.error else ''}"
                            for url, engine in self._engines.items()
                        )
                        raise ServingError(
                            f"{self.role}: no server for {what} within {self.limits.recovery_s:g} s "
                            f"({self.role}.servers.recovery_s):\n{states}"
                        )
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), patience)

    async def _release(self, engine: _Engine) -> None:
        async with self._changed:
            engine.in_flight -= 1
            self._changed.notify()

    async def _report(self, engine: _Engine, state: State, error: str) -> None:
        async with self._changed:
            # Requests that were under way when it failed report the same failure again.
            if engine.state is State.SERVING:
                self._set(engine, state, error)
            self._changed.notify_all()

    def _set(self, engine: _Engine, state: State, error: str) -> None:
        engine.state, engine.error, engine.bad_answers = state, error, 0
        if state is State.DOWN and (engine.watch is None or engine.watch.done()):
            engine.watch = asyncio.create_task(self._watch(engine))
        serving = any(e.state is State.SERVING for e in self._engines.values())
        self._none_since = None if serving else self._none_since or time.monotonic()

    async def _watch(self, engine: _Engine) -> None:
        """Wait until a server that is down is healthy again, then let it serve or call it stale."""
        pause = self.limits.backoff_s
        while engine.state is State.DOWN:
            await asyncio.sleep(min(pause, _LONGEST_WATCH_S))
            pause *= 2
            if not await engine.server.healthy():
                continue
            try:
                fresh = self._admit is None or await self._admit(engine.server)
            except ServerError as error:
                engine.error = str(error)
                continue
            async with self._changed:
                if engine.state is State.DOWN:
                    self._set(engine, State.SERVING if fresh else State.STALE, "" if fresh else "restarted")
                self._changed.notify_all()
