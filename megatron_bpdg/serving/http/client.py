"""One server over HTTP, with every way it can fail told apart."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Self, TypeVar

import aiohttp

Answer = TypeVar("Answer")

_CONNECT_S = 10.0
# Request timeout, too many requests: of routers; the request itself is right.
_BUSY = (408, 429)


class ServerError(RuntimeError):
    """A server did not do what it was asked; the message names its URL."""


class ServerUnavailable(ServerError):
    """It could not be reached, hung up, took too long or failed inside. Another server may well answer."""


class MalformedAnswer(ServerError):
    """It answered with something that is not what was asked for."""


class RequestRefused(ServerError):
    """It answered 4xx (but 408 and 429): the request is wrong, and would be anywhere."""


class Server:
    """JSON calls to one server, inside one event loop. Leaving its context closes the connections.

    Args:
        url: such as ``http://host:30000``.
        timeout_s: seconds one call may take, unless the call says otherwise.
        api_key: sent as bearer token where the server asks for one.
    """

    def __init__(self, url: str, timeout_s: float, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Answer of ``GET path``, parsed JSON (None where it is empty).

        Raises:
            ServerUnavailable, MalformedAnswer, RequestRefused: see each.
        """
        return _parsed(await self._call("GET", path, None, timeout_s), f"GET {self.url}{path}")

    async def post(self, path: str, body: dict[str, Any], *, timeout_s: float | None = None) -> Any:
        """Answer of ``POST path``, as for `get`."""
        content = await self.post_raw(path, body, timeout_s=timeout_s)
        return _parsed(content, f"POST {self.url}{path}")

    async def post_raw(self, path: str, body: dict[str, Any], *, timeout_s: float | None = None) -> bytes:
        """As `post`, but the answer as it came, for those who parse it better."""
        return await self._call("POST", path, body, timeout_s)

    async def healthy(self, *, timeout_s: float = 10.0) -> bool:
        """Whether it can generate now."""
        try:
            await self.get("/health", timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """What it says about its model: `model_path`, `weight_version` and more."""
        try:
            info = await self.get("/model_info", timeout_s=30.0)
        except RequestRefused:
            # sglang-router (seen with 0.3.2) passes it on under its old name only.
            info = await self.get("/get_model_info", timeout_s=30.0)
        if not isinstance(info, dict) or not isinstance(info.get("weight_version"), str):
            raise MalformedAnswer(f"{self.url}/model_info has no weight_version: SGLang 0.5.23 or newer is needed")
        return info

    async def weight_version(self) -> str:
        """The version that it names its weights by."""
        return str((await self.model_info())["weight_version"])

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None) -> bytes:
        if self._session is None:
            # The callers bound how much is in flight; a second bound here would only hide in queueing time.
            self._session = aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(limit=0))
        where = f"{method} {self.url}{path}"
        limit = aiohttp.ClientTimeout(total=timeout_s or self.timeout_s, sock_connect=_CONNECT_S)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=limit) as response:
                content = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerUnavailable(f"{where}: no connection within {_CONNECT_S:g} s") from error
        except TimeoutError as error:
            raise ServerUnavailable(f"{where}: no answer within {limit.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnavailable(f"{where}: {type(error).__name__}: {error}") from error
        text = content[:500].decode(errors="replace")
        if response.status >= 500 or response.status in _BUSY:
            raise ServerUnavailable(f"{where}: status {response.status}: {text}")
        if response.status in (401, 403):
            raise RequestRefused(
                f"{where}: status {response.status}: it wants its API key, of the environment variable that "
                "servers.api_key_env or --api-key-env names"
            )
        if response.status >= 400:
            raise RequestRefused(f"{where}: status {response.status}: {text}")
        return content


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError as error:
        text = content[:200].decode(errors="replace")
        raise MalformedAnswer(f"{where}: the answer is not JSON ({error}): {text!r}") from error


async def ask(
    url: str, api_key: str | None, question: Callable[[Server], Awaitable[Answer]], timeout_s: float = 30.0
) -> Answer:
    """What one server says.

    Raises:
        ServerError: it cannot be asked.
    """
    async with Server(url, timeout_s, api_key) as server:
        return await question(server)


async def ask_each(
    urls: Iterable[str], api_key: str | None, question: Callable[[Server], Awaitable[Answer]], timeout_s: float = 30.0
) -> dict[str, Answer | ServerError]:
    """What each server says, or how it failed. All are asked at once."""

    async def one(url: str) -> Answer | ServerError:
        try:
            return await ask(url, api_key, question, timeout_s)
        except ServerError as error:
            return error

    urls = list(urls)
    return dict(zip(urls, await asyncio.gather(*map(one, urls))))


def api_key(variable: str | None, where: str) -> str | None:
    """The key in an environment variable; None where no variable is named.

    Args:
        where: the field or option that names it.

    Raises:
        ValueError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"{where}: the environment has no {variable}")
    return key
