"""One SGLang server in the foreground: `bpdg serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megatron_bpdg.serving.http.client import Server
from megatron_bpdg.serving.http.process import Progress, RunningServer
from megatron_bpdg.serving.sglang.facts import ServerFacts, server_facts
from megatron_bpdg.serving.sglang.launch import ServerCommand

_REPORT_S = 15.0


def serve(command: ServerCommand, log: Path, deadline_s: float, console: Console) -> None:
    """Run a server until a signal interrupts or it ends; its facts are printed once it is healthy.

    Args:
        log: its output.
        deadline_s: seconds that it has to become healthy.

    Raises:
        ServerDied: the server ended by itself.
    """
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
