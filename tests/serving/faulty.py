"""A proxy in a process of its own that stands before a server and misbehaves on request.

Faults are set by ``POST /fault`` with ``{"kind": .., "count": ..}``: the next `count` calls of /generate suffer it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from typing import Any, Self

import aiohttp
from aiohttp import web

KINDS = ("slow", "refuse", "reset", "truncate", "garbage", "malformed", "error", "old_weights")
SLOW_S = 3600.0


class Proxy:
    """The handler; state is the fault under way."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.kind, self.left = "", 0
        self.suffered = 0

    async def fault(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["kind"] in KINDS
        self.kind, self.left = body["kind"], body["count"]
        return web.json_response({})

    async def count(self, request: web.Request) -> web.Response:
        return web.json_response({"suffered": self.suffered})

    async def forward(self, request: web.Request) -> web.StreamResponse:
        kind = self.kind if self.left and request.path == "/generate" else ""
        if kind:
            self.left -= 1
            self.suffered += 1
        if kind == "slow":
            await asyncio.sleep(SLOW_S)
        if kind == "refuse":
            return web.json_response({"error": {"message": "queue full"}}, status=503)
        if kind == "error":
            return web.Response(status=500, text="Internal Server Error")
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method,
                self.upstream + request.path,
                data=await request.read(),
                headers={"Content-Type": "application/json"},
            ) as upstream,
        ):
            content = await upstream.read()
            if kind == "garbage":
                content = b"<html>not what you asked for</html>"
            if kind == "malformed":
                content = _without_a_logprob(content)
            if kind == "old_weights":
                content = content.replace(b'"weight_version"', b'"was"').replace(b'"weight_versions"', b'"were"')
                content = content.replace(b'"meta_info":{', b'"meta_info":{"weight_version":"yesterday",')
            response = web.StreamResponse(status=upstream.status)
            response.content_length = len(content)
            await response.prepare(request)
            assert request.transport is not None
            if kind == "reset":
                request.transport.abort()
            elif kind == "truncate":
                await response.write(content[: len(content) // 2])
                request.transport.close()
            else:
                await response.write(content)
                await response.write_eof()
            return response


def _without_a_logprob(content: bytes) -> bytes:
    answer = json.loads(content)
    for item in answer if isinstance(answer, list) else [answer]:
        for name in ("output_token_logprobs", "input_token_logprobs"):
            item["meta_info"][name] = item["meta_info"].get(name, [])[1:]
    return json.dumps(answer).encode()


class FaultyServer:
    """Starts the proxy as a process; a context manager."""

    def __init__(self, upstream: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen([sys.executable, "-m", "tests.serving.faulty", upstream, str(port)])
        for _ in range(36000):
            try:
                self._call("/suffered")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the proxy did not start")

    def suffer(self, kind: str, count: int = 1) -> None:
        self._call("/fault", {"kind": kind, "count": count})

    @property
    def suffered(self) -> int:
        """Calls that a fault has befallen so far."""
        return int(self._call("/suffered")["suffered"])

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    upstream, port = sys.argv[1], int(sys.argv[2])
    proxy = Proxy(upstream)
    app = web.Application(client_max_size=2**30)
    app.router.add_post("/fault", proxy.fault)
    app.router.add_get("/suffered", proxy.count)
    app.router.add_route("*", "/{path:.*}", proxy.forward)
    web.run_app(app, host="127.0.0.1", port=port, print=None, handle_signals=False)


if __name__ == "__main__":
    main()
