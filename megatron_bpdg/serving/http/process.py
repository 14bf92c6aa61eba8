"""A server's processes: started as a group, watched until they are healthy, stopped together."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import psutil

from megatron_bpdg.parallel.launch import end_with_parent
from megatron_bpdg.serving.http.client import Server

_TAIL_LINES = 20
_POLL_S = 0.5
_REPORT_S = 15.0


@dataclass(frozen=True)
class Command:
    """How to start a server.

    Attributes:
        argv: program and arguments.
        env: environment variables on top of the caller's.
        host, port: where it listens.
        hints: words in its log, in small letters, and what they mean for the user.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    host: str
    port: int
    hints: ClassVar[Mapping[str, str]] = {}


class ServerDied(RuntimeError):
    """The server ended by itself, or did not become healthy in time; the message quotes the end of its log."""


@dataclass
class RunningServer:
    """One server with its scheduler and detokenizer, in a process group of their own.

    As a context manager it is started and healthy inside, and gone afterwards. Started in the main thread, it also ends
    when this process dies in a way that leaves no time for anything.

    Args:
        command: what to start.
        log: file that its output is appended to.
        deadline_s: seconds that it has to become healthy.
        grace_s: seconds that it has to stop before it is killed.
        progress: told now and then the seconds and the last line of the log while waiting for it.
    """

    command: Command
    log: Path
    _: KW_ONLY
    deadline_s: float = 1800.0
    grace_s: float = 30.0
    progress: Callable[[float, str], None] = lambda seconds, line: None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _log_start: int = field(default=0, init=False)

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.command.host, self.command.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.command.port}"

    @property
    def pid(self) -> int:
        """Process id of the server and id of its group."""
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and return when it is healthy.

        Raises:
            ValueError: its port is in use.
            ServerDied: it ended, or the deadline passed; nothing of it is left.
        """
        assert self._process is None, "started already"
        check_port(self.command.host, self.command.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command.argv,
                env={**os.environ, **self.command.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_term_with_parent if threading.current_thread() is threading.main_thread() else None,
            )
        try:
            asyncio.run(self._wait_until_healthy())
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Return never, unless interrupted by an exception of a signal handler.

        Raises:
            ServerDied: it ended.
        """
        assert self._process is not None, "not started"
        self._process.wait()
        raise self._died()

    def stop(self) -> None:
        """Ask it to stop, kill what is left after the grace period; returns when no process of it is left."""
        if self._process is None:
            return
        try:
            self._end(signal.SIGTERM)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all its processes; returns when they are gone."""
        if self._process is None:
            return
        self._end(signal.SIGKILL)
        self._process.wait()
        self._process = None

    async def _wait_until_healthy(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        reported = 0.0
        async with Server(self.url, timeout_s=10.0) as server:
            while not await server.healthy():
                if self._process.poll() is not None:
                    raise self._died()
                seconds = time.monotonic() - started
                if seconds > self.deadline_s:
                    raise ServerDied(f"the server is not healthy after {self.deadline_s:g} s; {self._log_end()}")
                if seconds - reported >= _REPORT_S:
                    reported = seconds
                    self.progress(seconds, next(reversed(self._tail()), ""))
                await asyncio.sleep(_POLL_S)
        if self._process.poll() is not None:
            raise self._died()

    def _died(self) -> ServerDied:
        assert self._process is not None
        code = self._process.wait()
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        text = "\n".join(self._tail(200)).lower()
        hint = next((f" ({meaning})" for words, meaning in self.command.hints.items() if words in text), "")
        return ServerDied(f"the server ended {how}{hint}; {self._log_end()}")

    def _log_end(self) -> str:
        lines = "\n".join(f"  {line}" for line in self._tail())
        return f"the end of {self.log}:\n{lines}" if lines else f"{self.log} is empty"

    def _tail(self, lines: int = _TAIL_LINES) -> list[str]:
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - 2**16))
            text = log.read().decode(errors="replace")
        return [line[:300] for line in text.splitlines() if line.strip()][-lines:]

    def _end(self, number: signal.Signals) -> None:
        """Send a signal; return when no process of the group runs any more, or the grace period is over.

        The group is looked for once, after the signal. What a process that heard SIGTERM still started is not among
        it, but SIGKILL, which ends every stop, leaves none the time to.
        """
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        group = [process for process in psutil.process_iter() if _group_of(process.pid) == self.pid]
        deadline = time.monotonic() + self.grace_s
        while any(map(_runs, group)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _runs(process: psutil.Process) -> bool:
    """Whether it is there and does not only wait to be collected, by whoever has inherited it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_port(host: str, port: int) -> None:
    """Refuse a port that another program listens on, whose answers would be taken for the server's.

    Raises:
        ValueError: it is in use, or `host` is no address of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            raise ValueError(f"--port {port} of --host {host}: {error.strerror}; choose another") from error


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; under nohup SIGHUP does not. Main thread only."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _term_with_parent() -> None:
    end_with_parent(signal.SIGTERM)
