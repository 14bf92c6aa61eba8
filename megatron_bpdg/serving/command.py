"""`bpdg serve`: one SGLang server in the foreground."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megatron_bpdg.serving.http.client import Server, api_key
from megatron_bpdg.serving.http.process import Progress, RunningServer, signals_interrupt
from megatron_bpdg.serving.sglang.facts import ServerFacts, server_facts
from megatron_bpdg.serving.sglang.launch import ServerCommand, as_hf, default_device, find_python, server_command
from megatron_bpdg.serving.sglang.role import Device, Role

_REPORT_S = 15.0


def serve(
    role: Role,
    checkpoint: Path,
    *,
    python: Path | None,
    export: Path | None,
    device: Device | None,
    host: str,
    port: int,
    tp: int,
    dtype: str | None,
    context_length: int | None,
    log: Path | None,
    deadline_s: float,
    dry_run: bool,
    api_key_env: str | None,
    extra: Sequence[str],
    console: Console,
) -> None:
    """Serve a checkpoint until Ctrl-C or SIGTERM.

    Args:
        log: the server's output; None: `serve-ROLE-PORT.log` in the working directory.
        dry_run: only print the command, on standard output.
        api_key_env: environment variable with the key that clients must send.
        Others: see `server_command`, `find_python`, `as_hf` and `RunningServer`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: an argument that cannot work.
        ServerDied: the server ended by itself.
    """
    interpreter = find_python(python)
    key = api_key(api_key_env, "--api-key-env")
    device = device or default_device()
    with signals_interrupt():
        command = server_command(
            as_hf(checkpoint, export, console),
            role,
            python=interpreter,
            device=device,
            host=host,
            port=port,
            tp=tp,
            dtype=dtype,
            context_length=context_length,
            extra=[*extra, "--api-key", key] if key else extra,
        )
        if dry_run:
            print(command)
            return
        console.print(escape(str(command)), soft_wrap=True, highlight=False)
        try:
            _run(command, log or Path(f"serve-{role}-{port}.log"), deadline_s, console)
        except KeyboardInterrupt as interrupt:
            console.print(f"stopped by {str(interrupt) or signal.SIGINT.name}")


def _run(command: ServerCommand, log: Path, deadline_s: float, console: Console) -> None:
    console.print(f"log: {log}", soft_wrap=True)
    with RunningServer(command, log, deadline_s=deadline_s, progress=_reporter(console)) as server:
        facts = asyncio.run(_ask(server.url, command.api_key))
        console.print(
            f"ready: {server.url} serves {facts.model}, {facts.dtype}, vocabulary {command.vocab_size}, context "
            f"{facts.context_length}, weights {facts.weight_version!r}, SGLang {facts.sglang}; Ctrl-C stops it",
            soft_wrap=True,
            highlight=False,
        )
        server.wait()


async def _ask(url: str, api_key: str | None) -> ServerFacts:
    async with Server(url, 30.0, api_key) as server:
        return await server_facts(server)


def _reporter(console: Console) -> Progress:
    """Says now and then how far the start is."""
    reported = 0.0

    def report(seconds: float, line: str) -> None:
        nonlocal reported
        if seconds - reported >= _REPORT_S:
            reported = seconds
            console.print(escape(f"starting for {seconds:.0f} s: {line}"), soft_wrap=True, highlight=False)

    return report
