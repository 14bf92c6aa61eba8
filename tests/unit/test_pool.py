"""The server pool against small HTTP servers that fail on cue: what is retried, where, how often, and what is said."""

from __future__ import annotations

import asyncio
import io
import types
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from rich.console import Console

from megatron_bpdg.config.servers import Servers
from megatron_bpdg.serving.http import pool as pool_module
from megatron_bpdg.serving.http import ready
from megatron_bpdg.serving.http.client import MalformedAnswer, RequestRefused, Server
from megatron_bpdg.serving.http.pool import ServerPool, ServingError, StaleWeights, State
from megatron_bpdg.serving.http.ready import wait_until_ready

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """An HTTP server whose answers to /work a test scripts; /health follows `healthy` and `paused`."""

    def __init__(self) -> None:
        self.script: list[Handler] = []
        self.asked = self.at_once = self.most_at_once = 0
        self.healthy, self.paused = True, False
        app = web.Application()
        app.router.add_post("/work", self._work)
        app.router.add_get("/health", self._health)
        app.router.add_post("/continue_generation", self._continue)
        self.server = TestServer(app)

    async def _work(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.script:
                return await self.script.pop(0)(request)
            await asyncio.sleep(0.01)
            return web.json_response({"done": (await request.json())["n"]})
        finally:
            self.at_once -= 1

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy and not self.paused else 503)

    async def _continue(self, request: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({"status": "ok"})

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")


def status(code: int, text: str = "broken inside") -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=code, text=text)

    return answer


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


async def hang_up(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"half": ')
    assert request.transport is not None
    request.transport.close()
    return response


def limits(*urls: str, **changes: Any) -> Servers:
    patient = {"timeout_s": 600.0, "attempts": 3, "backoff_s": 0.02, "recovery_s": 600.0, "concurrency": 4}
    return Servers(urls=list(urls), **{**patient, **changes})


def work(number: int) -> Callable[[Server], Awaitable[int]]:
    async def ask(server: Server) -> int:
        answer = await server.post("/work", {"n": number})
        if "done" not in answer:
            raise MalformedAnswer(f"{server.url}: no `done`")
        return int(answer["done"])

    return ask


def run(test: Callable[[Site, Site], Awaitable[None]]) -> None:
    async def main() -> None:
        sites = Site(), Site()
        for site in sites:
            await site.server.start_server()
        try:
            await test(*sites)
        finally:
            for site in sites:
                await site.server.close()

    asyncio.run(main())


def test_requests_share_the_servers_within_the_bound_and_each_is_answered_once() -> None:
    async def test(one: Site, two: Site) -> None:
        pool = ServerPool(limits(one.url, two.url, concurrency=3), "rollout")
        assert await asyncio.gather(*(pool.call(work(n), f"job {n}") for n in range(30))) == list(range(30))
        assert one.asked + two.asked == 30
        assert min(one.asked, two.asked) >= 10
        assert (one.most_at_once, two.most_at_once) == (3, 3)
        await pool.close()

    run(test)


@pytest.mark.parametrize(
    "failure",
    [status(500), status(503), status(429), status(408), hang, hang_up],
    ids=["500", "503", "429", "408", "slow", "cut"],
)
def test_a_failed_request_goes_to_the_other_server(failure: Handler) -> None:
    async def test(one: Site, two: Site) -> None:
        one.healthy = False
        one.script = [failure] * 9
        pool = ServerPool(limits(one.url, two.url), "rollout")
        # Not the other one's, which may be slow on a busy machine.
        pool._engines[one.url].server.timeout_s = 0.5 if failure is hang else 600.0
        assert await asyncio.gather(*(pool.call(work(n), f"job {n}") for n in range(6))) == list(range(6))
        assert (pool.in_state(State.DOWN), pool.in_state(State.SERVING)) == ([one.url], [two.url])
        assert pool.retries == one.asked > 0
        assert two.asked == 6
        await pool.close()

    run(test)


def test_a_server_that_recovers_serves_again() -> None:
    async def test(one: Site, two: Site) -> None:
        one.script = [status(500)]
        pool = ServerPool(limits(one.url), "rollout")
        assert await pool.call(work(7), "job") == 7
        assert one.asked == 2
        assert pool.in_state(State.SERVING) == [one.url]
        await pool.close()

    run(test)


def test_a_restarted_server_waits_for_its_weights() -> None:
    async def test(one: Site, two: Site) -> None:
        async def admit(server: Server) -> bool:
            return False

        one.script = [status(500)]
        pool = ServerPool(limits(one.url), "rollout", admit=admit)
        call = asyncio.create_task(pool.call(work(7), "job"))
        while not pool.in_state(State.STALE):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (one.asked, call.done()) == (1, False), "it served without its weights"
        await pool.set_states({one.url: State.SERVING})
        assert await call == 7
        await pool.close()

    run(test)


def test_old_weights_cost_no_try_and_take_the_server_out() -> None:
    async def test(one: Site, two: Site) -> None:
        async def ask(server: Server) -> str:
            if server.url == one.url:
                raise StaleWeights("old")
            return server.url

        pool = ServerPool(limits(one.url, two.url, attempts=1), "rollout")
        assert [await pool.call(ask, f"job {n}") for n in range(4)] == [two.url] * 4
        assert pool.in_state(State.STALE) == [one.url]
        await pool.close()

    run(test)


def test_the_budget_ends_the_tries_and_the_error_tells_all_of_them() -> None:
    async def test(one: Site, two: Site) -> None:
        one.script = [status(500, "first"), status(502, "second"), status(500, "third"), status(500, "fourth")]
        pool = ServerPool(limits(one.url), "rollout")
        with pytest.raises(ServingError, match=r"rollout: job 3 failed 3 times \(rollout.servers.attempts\)") as caught:
            await pool.call(work(3), "job 3")
        for part in ("status 500: first", "status 502: second", "status 500: third", one.url):
            assert part in str(caught.value)
        await pool.close()

    run(test)


def test_no_server_left_is_an_error_after_the_patience() -> None:
    async def test(one: Site, two: Site) -> None:
        gone = f"http://127.0.0.1:{unused_port()}"
        pool = ServerPool(limits(gone, attempts=9, recovery_s=0.3), "teacher")
        with pytest.raises(
            ServingError, match=r"teacher: no server for job within 0.3 s \(teacher.servers.recovery_s\)"
        ) as e:
            await pool.call(work(0), "job")
        assert f"{gone}: down" in str(e.value)
        await pool.close()

    run(test)


def test_a_wrong_request_is_not_sent_again() -> None:
    async def test(one: Site, two: Site) -> None:
        one.script = [status(400, "temperature must be positive")]
        pool = ServerPool(limits(one.url), "rollout")
        with pytest.raises(RequestRefused, match="status 400: temperature must be positive"):
            await pool.call(work(0), "job")
        assert one.asked == 1
        assert await pool.call(work(1), "job") == 1
        await pool.close()

    run(test)


@pytest.mark.parametrize("code", [401, 403])
def test_a_missing_key_is_named_as_such(code: int) -> None:
    async def test(one: Site, two: Site) -> None:
        one.script = [status(code, '{"error": "Unauthorized"}')]
        async with Server(one.url, timeout_s=5.0) as server:
            with pytest.raises(RequestRefused, match=rf"status {code}: it wants its API key, .*servers\.api_key_env"):
                await server.post("/work", {"n": 0})

    run(test)


def test_a_server_that_keeps_answering_nonsense_is_taken_out() -> None:
    async def test(one: Site, two: Site) -> None:
        one.healthy = False
        one.script = [status(200, "<html>"), status(200, "{}"), status(200, "[1")] * 5
        pool = ServerPool(limits(one.url, two.url, attempts=9), "rollout")
        assert await asyncio.gather(*(pool.call(work(n), f"job {n}") for n in range(20))) == list(range(20))
        assert pool.in_state(State.DOWN) == [one.url]
        await pool.close()

    run(test)


def pauses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the pool would have slept, in seconds; it does not."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(pool_module, "asyncio", types.SimpleNamespace(**{**vars(asyncio), "sleep": record}))
    return pauses


async def stays_away(pool: ServerPool, engine: Any) -> None:
    """In place of the watch over a server that is down."""


def test_three_bad_answers_in_a_row_take_a_server_out_and_a_good_one_starts_the_count_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses_of(monkeypatch)
    monkeypatch.setattr(ServerPool, "_watch", stays_away)

    async def test() -> None:
        pool = ServerPool(limits("http://one", "http://two", attempts=9), "rollout")
        good = iter([False, False, True] * 3 + [False, False, False])
        asked: list[str] = []

        async def ask(server: Server) -> None:
            asked.append(server.url)
            if server.url == "http://one" and not next(good):
                raise MalformedAnswer("nonsense")

        for _ in range(3):
            await pool.call(ask, "job")
        assert asked == ["http://one"] * 9
        assert pool.in_state(State.DOWN) == []
        await pool.call(ask, "job")
        assert asked[9:] == ["http://one"] * 3 + ["http://two"]
        assert pool.in_state(State.DOWN) == ["http://one"]

    asyncio.run(test())


def test_pauses_between_tries_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = pauses_of(monkeypatch)
    monkeypatch.setattr(ServerPool, "_watch", stays_away)

    async def test() -> None:
        async def ask(server: Server) -> None:
            raise MalformedAnswer("nonsense")

        # Nine tries, three for each server until it is out.
        pool = ServerPool(
            limits("http://a", "http://b", "http://c", "http://d", attempts=9, backoff_s=1.0, recovery_s=0.01),
            "rollout",
        )
        for _ in range(2):
            with pytest.raises(ServingError, match="job failed 9 times"):
                await pool.call(ask, "job")
            assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
            pauses.clear()
            await pool.set_states(dict.fromkeys(pool.urls, State.SERVING))

    asyncio.run(test())


def test_looks_at_a_server_that_is_down_are_doubly_far_apart_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = pauses_of(monkeypatch)
    healthy = iter([False] * 5 + [True])

    async def ask_health(server: Server) -> bool:
        return next(healthy)

    monkeypatch.setattr(Server, "healthy", ask_health)

    async def test() -> None:
        pool = ServerPool(limits("http://one", backoff_s=0.5), "rollout")
        await pool.set_states({"http://one": State.DOWN})
        watch = pool._engines["http://one"].watch
        assert watch is not None
        await watch
        assert pool.in_state(State.SERVING) == ["http://one"]
        assert pauses == [0.5, 1, 2, 4, 5, 5]

    asyncio.run(test())


def test_a_request_goes_to_the_server_with_the_fewest_under_way() -> None:
    async def test() -> None:
        pool = ServerPool(limits("http://one", "http://two"), "rollout")
        under_way: list[tuple[str, asyncio.Event]] = []

        async def ask(server: Server) -> None:
            under_way.append((server.url, asyncio.Event()))
            await under_way[-1][1].wait()

        async def start() -> asyncio.Task[None]:
            count, task = len(under_way), asyncio.create_task(pool.call(ask, "job"))
            while len(under_way) == count:
                await asyncio.sleep(0)
            return task

        tasks = [await start() for _ in range(4)]
        assert [url for url, _ in under_way] == ["http://one", "http://two"] * 2
        for number in (1, 3):
            under_way[number][1].set()
            await tasks[number]
        # One has two under way and two has none: two is asked until both have as many, then by turns.
        tasks += [await start() for _ in range(4)]
        assert [url for url, _ in under_way[4:]] == ["http://two", "http://two", "http://one", "http://two"]
        for _, event in under_way:
            event.set()
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_servers_that_still_start_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(one: Site, two: Site) -> None:
        # No time passes, however busy the machine is.
        monkeypatch.setattr(ready, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
        two.healthy = False
        said = Console(file=io.StringIO(), width=200)
        waiting = asyncio.create_task(
            wait_until_ready(limits(one.url, two.url, recovery_s=60.0), "teacher", None, said)
        )
        await asyncio.sleep(0.3)
        assert not waiting.done()
        two.healthy = True
        await waiting
        printed = said.file.getvalue()  # type: ignore[attr-defined]
        assert printed == f"waiting for teacher server {two.url}: 0 of 60 s (teacher.servers.recovery_s)\n"
        one.healthy = False
        monkeypatch.undo()
        await wait_until_ready(limits(one.url, recovery_s=0.01), "rollout", None, said)

    run(test)


def test_engines_that_a_dead_trainer_left_paused_go_on() -> None:
    async def test(one: Site, two: Site) -> None:
        gone = f"http://127.0.0.1:{unused_port()}"
        one.paused = two.paused = True
        said = Console(file=io.StringIO())
        await wait_until_ready(limits(one.url), "rollout", None, said, engines=[one.url, gone])
        assert not one.paused
        await wait_until_ready(limits(two.url, recovery_s=0.01), "teacher", None, said)
        assert two.paused, "it is not this run's to let go on"

    run(test)


def test_urls_are_checked() -> None:
    with pytest.raises(ValueError, match="url 'host:30000' should start with http://"):
        Servers(urls=["host:30000"])
    with pytest.raises(ValueError, match="has a URL twice"):
        Servers(urls=["http://a:1", "http://a:1/"])
