"""Real SGLang servers for the tests: started through `bpdg serve`'s own code, stopped when the tests are over."""

from __future__ import annotations

import socket
from collections.abc import Iterator
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

    @property
    def alive(self) -> bool:
        return self._process is not None

    def kill9(self) -> None:
        self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()


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


class Servers:
    """Servers by name, started when they are first asked for, and again where a test has left them dead.

    Starting one takes half a minute of a core: all tests share them, in one worker.
    """

    def __init__(self, miniature: Miniature, python: str, logs: Path) -> None:
        self.python, self.logs = python, logs
        self.served = {
            "student": (miniature.student, Role.STUDENT),
            "teacher": (miniature.teacher, Role.TEACHER),
            "other": (miniature.teacher, Role.STUDENT),
        }
        self.started: dict[str, ServerUnderTest] = {}

    def get(self, name: str) -> ServerUnderTest:
        if name not in self.started:
            model, role = self.served[name]
            command = server_command(model, role, python=self.python, device=Device.CPU, port=free_port())
            log = self.logs / f"{name}.log"
            self.started[name] = ServerUnderTest(command, log, deadline_s=DEADLINE_S, grace_s=15.0)
        if not self.started[name].alive:
            self.started[name].start()
        return self.started[name]


@pytest.fixture(scope="session")
def servers(miniature: Miniature, sglang: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Their logs stay in pytest's temporary directory."""
    servers = Servers(miniature, sglang, tmp_path_factory.mktemp("servers"))
    yield servers
    for server in servers.started.values():
        server.stop()


@pytest.fixture
def student_server(servers: Servers) -> ServerUnderTest:
    """Serves the miniature student; its weights are whatever the last test sent. Tests may kill it."""
    return servers.get("student")


@pytest.fixture
def other_server(servers: Servers) -> ServerUnderTest:
    """A second one that takes weights, started from other ones than the student's. Tests may kill it."""
    return servers.get("other")


@pytest.fixture
def teacher_server(servers: Servers) -> ServerUnderTest:
    """Serves the miniature teacher, whose weights stay as they are."""
    return servers.get("teacher")
