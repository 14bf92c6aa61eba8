"""Patience with servers that are still starting: a job usually starts them together with the trainer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from megatron_bpdg.config.servers import Servers
from megatron_bpdg.serving.http.client import Server, ask_each

_POLL_S = 1.0
_REPORT_S = 15.0


async def wait_until_ready(
    servers: Servers, role: str, api_key: str | None, console: Console, *, engines: Sequence[str] = ()
) -> None:
    """Return when all servers of a role are healthy, or when `recovery_s` has passed.

    What is not healthy by then is for those to judge who need it.

    Args:
        role: for the lines that say what is waited for.
        engines: those that take weights. They are let go on first: a trainer that died within an update has left them
            paused, and such a server is never healthy.
    """
    await resume(engines, api_key)
    started = time.monotonic()
    reported = started - _REPORT_S
    missing = list(servers.urls)
    while True:
        found = await healthy(missing, api_key)
        missing = [url for url in missing if url not in found]
        now = time.monotonic()
        if not missing or now - started > servers.recovery_s:
            return
        if now - reported >= _REPORT_S:
            reported = now
            line = (
                f"waiting for {role} server {', '.join(missing)}: {now - started:.0f} of {servers.recovery_s:g} s "
                f"({role}.servers.recovery_s)"
            )
            console.print(Text(line), soft_wrap=True)
        await asyncio.sleep(_POLL_S)


async def healthy(urls: Iterable[str], api_key: str | None) -> set[str]:
    """Those that can generate now."""
    return {url for url, found in (await ask_each(urls, api_key, Server.healthy)).items() if found is True}


async def resume(urls: Iterable[str], api_key: str | None) -> None:
    """Let engines go on that are paused; to others, or those that are not there, nothing happens."""
    # What does not hear it is not healthy either, and treated as such.
    await ask_each(urls, api_key, lambda server: server.post("/continue_generation", {}), 10.0)
