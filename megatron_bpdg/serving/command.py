"""One SGLang server in the foreground: `bpdg serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megatron_bpdg.serving.http.client import ask
from megatron_bpdg.serving.http.process import RunningServer
from megatron_bpdg.serving.sglang.facts import server_facts
from megatron_bpdg.serving.sglang.launch import ServerCommand


def serve(command: ServerCommand, log: Path, deadline_s: float, console: Console) -> None:
    """Run a server until a signal interrupts or it ends; its facts are printed once it is healthy.

    Args:
        log: its output.
        deadline_s: seconds that it has to become healthy.

    Raises:
        ServerDied: the server ended by itself.
    """

    def report(seconds: float, line: str) -> None:
        console.print(escape(f"starting for {seconds:.0f} s: {line}"), soft_wrap=True, highlight=False)

    console.print(f"log: {log}", soft_wrap=True)
    with RunningServer(command, log, deadline_s=deadline_s, progress=report) as server:
        facts = asyncio.run(ask(server.url, command.api_key, server_facts))
        console.print(
            f"ready: {server.url} serves {facts.model}, {facts.dtype}, vocabulary {command.vocab_size}, context "
            f"{facts.context_length}, weights {facts.weight_version!r}, SGLang {facts.sglang}; Ctrl-C stops it",
            soft_wrap=True,
            highlight=False,
        )
        server.wait()
