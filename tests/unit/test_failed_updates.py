"""The rollout engine against small HTTP servers that fail at a weight update, at the probe, or at sampling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiohttp import web

from megatron_bpdg.config.rollout import Sampling, WeightSync
from megatron_bpdg.config.servers import Servers
from megatron_bpdg.parallel.mesh import Mesh
from megatron_bpdg.rollout.engine import Probe, Request, generate
from megatron_bpdg.rollout.sglang import SGLangEngine
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import Server
from megatron_bpdg.serving.http.pool import ServingError, State
from megatron_bpdg.serving.sglang.facts import served_token_limits
from megatron_bpdg.serving.sglang.weights import DiskSync, WeightSyncError, base

PROBE = Probe([1, 2, 3], torch.tensor([-1.0, -1.0]), 1e-3)
PATIENCE: dict[str, Any] = {"timeout_s": 600.0, "attempts": 3, "backoff_s": 0.02, "recovery_s": 600.0}
SAMPLING = Sampling(max_new_tokens=4)


class FakeEngine:
    """Answers as SGLang does, but for the paths in `faults`, which it asks first for (status, JSON) or None."""

    def __init__(self) -> None:
        self.version = "default"
        self.calls: list[str] = []
        self.faults: dict[str, Callable[[], tuple[int, Any] | None]] = {}
        self.hang: set[str] = set()
        self.released = asyncio.Event()
        self.info: Any = {}
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        path = request.path
        if path == "/generate" and body["sampling_params"]["max_new_tokens"] == 0:
            path = "/probe"
        self.calls.append(path)
        if path in self.hang:
            await self.released.wait()
        if path == "/update_weights_from_disk":
            # SGLang names the weights before it can fail to flush its cache.
            self.version = body["weight_version"]
        if path in self.faults and (answer := self.faults[path]()) is not None:
            return web.json_response(answer[1], status=answer[0])
        meta: dict[str, Any] = {"weight_version": self.version}
        if path == "/model_info":
            return web.json_response({"model_path": "m", **meta})
        if path == "/server_info":
            return web.json_response(self.info)
        if path == "/probe":
            (ids,) = body["input_ids"]
            pairs = [[None, 1, None], *([-1.0, token, None] for token in ids[1:])]
            return web.json_response([{"output_ids": [], "meta_info": meta | {"input_token_logprobs": pairs}}])
        if path == "/generate":
            meta |= {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-1.0, 1, None]]}
            return web.json_response({"output_ids": [1], "meta_info": meta})
        return web.json_response({"success": True})

    async def start(self, stack: list[web.AppRunner]) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"


def times(count: int, answer: tuple[int, Any]) -> Callable[[], tuple[int, Any] | None]:
    """The answer so many times, then what the engine says by itself."""
    left = iter([answer] * count)
    return lambda: next(left, None)


class NoWeights:
    """Nothing to send: what is tried here is who is told what, and when."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter([])

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


class Setup:
    """Two engines, and a trainer of one rank that may roll out on them."""

    def __init__(self, one: FakeEngine, two: FakeEngine, sync: DiskSync, stack: ExitStack) -> None:
        self.one, self.two, self.sync, self._stack = one, two, sync, stack

    def engine(self, *urls: str, sync_urls: list[str] | None = None, **patience: Any) -> SGLangEngine:
        group = dist.distributed_c10d._get_default_group()
        engine = SGLangEngine(
            Servers(urls=list(urls), **{**PATIENCE, **patience}),
            self.sync,
            sync_urls=sync_urls,
            mesh=Mesh(group, group, group, is_last_stage=True, data_rank=0, data_size=1),
            vocab_size=10,
        )
        self._stack.callback(engine.close)
        return engine


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    background, runners = Background("fake-engines"), []
    engines = FakeEngine(), FakeEngine()
    try:
        for engine in engines:
            background.run(engine.start(runners))
        with ExitStack() as stack:
            yield Setup(*engines, DiskSync(WeightSync(), tmp_path), stack)
    finally:
        for runner in runners:
            background.run(runner.cleanup())
        background.close()
        dist.destroy_process_group()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


NOT_FLUSHED = (400, {"success": False, "message": "Weights were updated, but the cache was not flushed"})


@pytest.mark.parametrize(
    ("path", "fault"),
    [("/update_weights_from_disk", NOT_FLUSHED), ("/probe", (500, {}))],
    ids=["not-flushed", "no-answer-to-the-probe"],
)
def test_an_engine_whose_update_failed_serves_after_the_next_update_and_probe_only(
    setup: Setup, path: str, fault: tuple[int, Any]
) -> None:
    engine = setup.engine(setup.one.url, setup.two.url)
    setup.one.faults[path] = times(1, fault)
    engine.load_weights(NoWeights(), 0, PROBE)
    # It calls its weights by the right name, and is healthy.
    assert setup.one.version == setup.two.version
    assert engine.pool.in_state(State.SERVING) == [setup.two.url]
    wait_for(lambda: setup.one.url not in engine.pool.in_state(State.DOWN))
    assert engine.pool.in_state(State.STALE) == [setup.one.url]
    generate(engine, [Request([3], 0)], SAMPLING)
    assert "/generate" not in setup.one.calls
    assert engine.pool.in_state(State.SERVING) == [setup.one.url, setup.two.url]
    assert (setup.one.calls.count("/update_weights_from_disk"), setup.one.calls.count("/probe")) == (
        2,
        2 if path == "/probe" else 1,
    )


def test_a_router_waits_for_an_engine_behind_it_that_passes_for_updated(setup: Setup) -> None:
    engine = setup.engine(setup.two.url, sync_urls=[setup.one.url, setup.two.url + "/engine"])
    setup.one.faults["/update_weights_from_disk"] = times(1, NOT_FLUSHED)
    setup.two.faults["/engine/model_info"] = lambda: (200, {"model_path": "m", "weight_version": setup.one.version})
    engine.load_weights(NoWeights(), 0, None)
    assert engine.pool.in_state(State.STALE) == [setup.two.url]
    # A dead engine is the router's business.
    setup.one.faults["/model_info"] = lambda: (500, {})
    engine.load_weights(NoWeights(), 1, None)
    assert engine.pool.in_state(State.SERVING) == [setup.two.url]


def test_the_only_engine_may_fail_at_an_update_as_often_as_at_a_request(setup: Setup) -> None:
    engine = setup.engine(setup.one.url)
    setup.one.faults["/update_weights_from_disk"] = times(2, (503, {}))
    engine.load_weights(NoWeights(), 0, PROBE)
    assert engine.pool.in_state(State.SERVING) == [setup.one.url]
    setup.one.faults["/update_weights_from_disk"] = times(3, (503, {}))
    with pytest.raises(ServingError, match=r"no engine took the weights of step 1 \(tries: 3; rollout") as caught:
        engine.load_weights(NoWeights(), 1, PROBE)
    assert "status 503" in str(caught.value)


def test_an_engine_that_is_away_is_waited_for(setup: Setup) -> None:
    engine = setup.engine(setup.one.url)
    setup.one.faults["/update_weights_from_disk"] = times(1, (503, {}))
    setup.one.faults["/health"] = times(2, (503, {}))
    engine.load_weights(NoWeights(), 0, PROBE)
    assert setup.one.calls.count("/health") == 3
    impatient = setup.engine(setup.two.url, recovery_s=0.01)
    setup.two.faults["/update_weights_from_disk"] = setup.two.faults["/health"] = lambda: (503, {})
    with pytest.raises(ServingError, match=r"no engine took the weights of step 0 \(tries: 1"):
        impatient.load_weights(NoWeights(), 0, PROBE)


def test_a_server_that_aborts_everything_spends_the_budget(setup: Setup) -> None:
    engine = setup.engine(setup.one.url)
    engine.load_weights(NoWeights(), 0, PROBE)

    def abort() -> tuple[int, Any]:
        meta = {"finish_reason": {"type": "abort"}, "output_token_logprobs": [], "weight_version": setup.one.version}
        return 200, {"output_ids": [], "meta_info": meta}

    left = iter(range(100))
    setup.one.faults["/generate"] = lambda: abort() if next(left, None) is not None else None
    with pytest.raises(ServingError, match="aborted before its first token, and not by this run"):
        generate(engine, [Request([3], 0)], SAMPLING)
    assert (setup.one.calls.count("/generate"), engine.pool.retries) == (3, 2)


def test_an_engine_that_hangs_does_not_hold_the_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_CONTROL_S", 0.3)
    post = Server.post

    async def patient_with_two(server: Server, path: str, body: Any, *, timeout_s: float | None = None) -> Any:
        return await post(server, path, body, timeout_s=timeout_s if server.url == setup.one.url else 600.0)

    monkeypatch.setattr(Server, "post", patient_with_two)
    setup.one.hang = {"/pause_generation", "/continue_generation"}
    with pytest.raises(WeightSyncError) as caught:
        setup.sync.push(NoWeights(), "v", [setup.one.url, setup.two.url])
    assert "no answer within 0.3 s" in caught.value.failed[setup.one.url]
    assert list(caught.value.failed) == [setup.one.url]
    assert setup.two.calls[-1] == "/continue_generation"
    assert setup.two.version == "v"
    setup.one.released.set()


PAUSE, BEGIN, SEND = "/pause_generation", "/begin_weight_update", "/weights"
END, CONTINUE = "/end_weight_update", "/continue_generation"


@pytest.mark.parametrize(
    ("path", "calls"),
    [
        (PAUSE, [PAUSE, CONTINUE]),
        (BEGIN, [PAUSE, END, BEGIN, CONTINUE]),
        (SEND, [PAUSE, END, BEGIN, SEND, END, CONTINUE]),
        (END, [PAUSE, END, BEGIN, SEND, SEND, END, END, CONTINUE]),
        (CONTINUE, [PAUSE, END, BEGIN, SEND, SEND, END, CONTINUE]),
    ],
)
def test_an_engine_that_fails_within_an_update_is_closed_and_let_go_on(
    setup: Setup, path: str, calls: list[str]
) -> None:
    for engine in (setup.one, setup.two):
        # Nothing is open at first: it refuses to close it, and that is no failure.
        engine.faults[END] = times(1, (400, {}))
    # The first error is the one that is kept.
    setup.one.faults[path] = setup.one.faults[CONTINUE] = lambda: (400, {})
    urls = [setup.one.url, setup.two.url]
    with base.Update(urls, pause="retract", timeout_s=600.0, api_key=None) as update:
        update.begin()
        update.post(SEND, {})
        update.post(SEND, {})
        update.end()
    assert list(update.failed) == [setup.one.url]
    assert f"{path}: status 400" in update.failed[setup.one.url]
    assert setup.one.calls == calls
    assert setup.two.calls == [PAUSE, END, BEGIN, SEND, SEND, END, CONTINUE]


def test_room_that_servers_name(setup: Setup) -> None:
    setup.one.info = {"max_req_input_len": 506}
    assert served_token_limits([setup.one.url, setup.two.url, "http://127.0.0.1:9"], None) == {setup.one.url: 505}
