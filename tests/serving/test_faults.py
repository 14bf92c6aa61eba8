"""Servers that fail in every way they do: each with real processes, and each time the run goes on, or says why not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.rollout.engine import Request, Response, generate
from megatron_bpdg.rollout.sampling import sample_seed
from megatron_bpdg.serving.http.pool import ServingError, State
from megatron_bpdg.serving.sglang.weights import WeightSyncError
from tests.integration.miniature import Miniature
from tests.serving.conftest import DEADLINE_S
from tests.serving.faulty import FaultyServer
from tests.serving.parts import check_response, patience, trainer

SAMPLING = Sampling(max_new_tokens=24)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def faulty(student_server: Any) -> Iterator[FaultyServer]:
    with FaultyServer(student_server.url, free_port()) as proxy:
        yield proxy


def requests(count: int) -> list[Request]:
    return [Request([3 + i % 7, 4], sample_seed(0, i)) for i in range(count)]


def check_all(checkpoint: Path, asked: list[Request], responses: list[Response], version: int) -> None:
    assert len(responses) == len(asked)
    for request, response in zip(asked, responses):
        assert response.ids
        assert response.version_R.tolist() == [version] * len(response.ids)
        check_response(checkpoint, request.prompt_ids, response)


@pytest.mark.parametrize("kind", ["slow", "refuse", "reset", "truncate", "garbage", "malformed", "error"])
def test_a_fault_of_the_only_server_costs_a_retry(
    miniature: Miniature, faulty: FaultyServer, tmp_path: Path, kind: str
) -> None:
    timeout = 10.0 if kind == "slow" else 600.0
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(faulty.url, timeout_s=timeout))
        student.send(engine, version=1)
        faulty.suffer(kind)
        check_all(miniature.student, requests(6), generate(engine, requests(6), SAMPLING), version=1)
        assert faulty.suffered == 1
        assert engine.retries >= 1
        engine.close()


def test_an_answer_by_old_weights_is_not_taken_and_the_server_gets_them_again(
    miniature: Miniature, faulty: FaultyServer, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(faulty.url))
        student.send(engine, version=1)
        faulty.suffer("old_weights")
        pushed: list[list[str]] = []
        push = engine._push
        engine._push = lambda urls: (pushed.append(list(urls)), push(urls))[1]  # type: ignore[method-assign,func-returns-value]
        check_all(miniature.student, requests(4), generate(engine, requests(4), SAMPLING), version=1)
        assert (faulty.suffered, pushed) == (1, [[faulty.url]])
        engine.close()


def test_a_budget_that_is_spent_ends_the_run_with_the_reasons(
    miniature: Miniature, faulty: FaultyServer, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(faulty.url, attempts=3))
        student.send(engine, version=1)
        faulty.suffer("error", count=100)
        with pytest.raises(ServingError, match=r"response \d failed 3 times \(rollout.servers.attempts\)") as caught:
            generate(engine, requests(2), SAMPLING)
        assert str(caught.value).count("status 500: Internal Server Error") == 3
        engine.close()


def test_an_engine_that_does_not_take_the_weights_it_was_sent(
    miniature: Miniature, student_server: Any, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        # What was sent is not what the probe was asked about, as after a broken export.
        probe = student.probe()
        student.change(0.7)
        with pytest.raises(WeightSyncError, match="does not answer as the weights it was sent: log-probs of the probe"):
            engine.load_weights(student.weights, 1, probe)
        engine.close()


def test_kill_9_of_a_server_while_it_samples(
    miniature: Miniature, other_server: Any, student_server: Any, tmp_path: Path
) -> None:
    """One of two servers dies at work and comes back with its old weights; later the other one dies too."""
    one, two = other_server, student_server
    asked = requests(200)
    sampling = Sampling(max_new_tokens=56)
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(one.url, two.url, concurrency=8))
        student.send(engine, version=1)
        stream = engine.stream(asked, sampling)
        batches = iter(stream)
        done = dict(next(batches))
        assert len(done) < len(asked)
        one.kill9()
        for finished in batches:
            assert not done.keys() & dict(finished).keys(), "a response came twice"
            done.update(finished)
        check_all(miniature.student, asked, [done[i] for i in range(len(asked))], version=1)
        assert engine.pool.in_state(State.SERVING) == [two.url]

        # An update while it is away goes to the other; back again, it does not serve before it has the weights.
        student.change(0.9)
        student.send(engine, version=2)
        assert engine.pool.in_state(State.SERVING) == [two.url]
        one.restart()
        wait_for(lambda: engine.pool.in_state(State.STALE) == [one.url])
        two.kill9()
        responses = generate(engine, asked[:20], sampling)
        assert {int(v) for r in responses for v in r.version_R} == {2}
        assert engine.pool.in_state(State.SERVING) == [one.url]
        engine.close()


def test_the_only_server_dies_and_comes_back(miniature: Miniature, other_server: Any, tmp_path: Path) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(other_server.url))
        student.send(engine, version=1)
        other_server.kill9()
        back = threading.Thread(target=other_server.restart)
        back.start()
        check_all(miniature.student, requests(8), generate(engine, requests(8), SAMPLING), version=1)
        back.join()
        engine.close()


def test_a_server_that_never_comes_back(miniature: Miniature, other_server: Any, tmp_path: Path) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(other_server.url, attempts=50, recovery_s=3.0))
        student.send(engine, version=1)
        other_server.kill9()
        with pytest.raises(ServingError, match=r"no server for response \d within 3 s") as caught:
            generate(engine, requests(2), SAMPLING)
        assert f"{other_server.url}: down" in str(caught.value)
        with pytest.raises(ServingError, match="no engine took the weights of step 2"):
            student.send(engine, version=2)
        engine.close()


def wait_for(true: Any, seconds: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
