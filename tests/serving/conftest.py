"""Real SGLang servers for the tests: started through `bpdg serve`'s own code, stopped when the tests are over."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_bpdg.serving.http.process import RunningServer
from megatron_bpdg.serving.sglang.launch import find_python, server_command
from megatron_bpdg.serving.sglang.role import Device, Role
from tests.integration.miniature import Miniature, make_miniature

INSTALLED = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
# Of everything that is waited for: only a net for what would hang for ever, on machines however busy.
DEADLINE_S = 3600.0


class ServerUnderTest(RunningServer):
    """A server that tests may kill and start again, at the same port."""

    def kill9(self) -> None:
        self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()


ServerFactory = Callable[..., ServerUnderTest]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    return make_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="session")
def sglang() -> str:
    """The servers' Python. The tests do not pass without it: servers that nothing was tried on are worth little."""
    try:
        return find_python(INSTALLED if INSTALLED.exists() else None)
    except ValueError as error:
        pytest.fail(f"no SGLang to test with; `make sglang` installs it: {error}", pytrace=False)


@pytest.fixture(scope="session")
def start_server(sglang: str, tmp_path_factory: pytest.TempPathFactory) -> ServerFactory:
    """Starts a server; who calls it stops it. Its log stays in pytest's temporary directory."""
    logs = tmp_path_factory.mktemp("servers")

    def start(model: Path, *flags: str, role: Role = Role.STUDENT) -> ServerUnderTest:
        port = free_port()
        command = server_command(model, role, python=sglang, device=Device.CPU, port=port, extra=flags)
        server = ServerUnderTest(command, logs / f"{role}-{port}.log", deadline_s=DEADLINE_S, grace_s=15.0)
        server.start()
        return server

    return start


@pytest.fixture
def server_factory(start_server: ServerFactory) -> Iterator[ServerFactory]:
    """``server_factory(model, *flags, role=..)``: a healthy server, stopped when the test is over."""
    started: list[ServerUnderTest] = []

    def start(model: Path, *flags: str, role: Role = Role.STUDENT) -> ServerUnderTest:
        started.append(start_server(model, *flags, role=role))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def student_server(miniature: Miniature, start_server: ServerFactory) -> Iterator[ServerUnderTest]:
    """Serves the miniature student; its weights are whatever the last test sent."""
    with_weights = start_server(miniature.student)
    yield with_weights
    with_weights.stop()


@pytest.fixture(scope="session")
def teacher_server(miniature: Miniature, start_server: ServerFactory) -> Iterator[ServerUnderTest]:
    """Serves the miniature teacher, whose weights stay as they are."""
    server = start_server(miniature.teacher, role=Role.TEACHER)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def teacher_server_for_updates(miniature: Miniature, start_server: ServerFactory) -> Iterator[ServerUnderTest]:
    """A second server that takes weights, started from other ones than the student's."""
    server = start_server(miniature.teacher)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def restartable_server(miniature: Miniature, start_server: ServerFactory) -> Iterator[ServerUnderTest]:
    """Serves the miniature student; tests may kill it, and start it again before they end."""
    server = start_server(miniature.student)
    yield server
    server.stop()
