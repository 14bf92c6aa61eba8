"""Patience with servers that are still starting: a job usually starts them together with the trainer."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console
from rich.markup import escape

from megatron_bpdg.config.schema import Servers
from megatron_bpdg.serving.client import Server

_POLL_S = 1.0
_REPORT_S = 15.0


async def wait_until_ready(servers: Servers, role: str, api_key: str | None, console: Console) -> None:
    """Return when all servers of a role are healthy, or when `recovery_s` has passed.

    What is not healthy by then is for those to judge who need it.

    Args:
        role: for the lines that say what is waited for.
    """
    started = time.monotonic()
    reported = started - _REPORT_S
    missing = list(servers.urls)
    while True:
        missing = [url for url in missing if not await _healthy(url, api_key)]
        now = time.monotonic()
        if not missing or now - started > servers.recovery_s:
            return
        if now - reported >= _REPORT_S:
            reported = now
            console.print(
                escape(
                    f"waiting for {role} server {', '.join(missing)}: {now - started:.0f} of {servers.recovery_s:g} s "
                    f"({role}.servers.recovery_s)"
                ),
                soft_wrap=True,
                highlight=False,
            )
        await asyncio.sleep(_POLL_S)


async def _healthy(url: str, api_key: str | None) -> bool:
    async with Server(url, timeout_s=10.0, api_key=api_key) as server:
        return await server.healthy()
