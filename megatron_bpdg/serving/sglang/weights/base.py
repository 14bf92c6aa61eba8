"""What all ways of sending weights share: pausing, telling several servers at once, and who failed.

`DiskSync`, `TensorSync` and `DistributedSync` make one `Update` per push, on rank 0, which alone calls the servers;
`share_outcome` then tells all ranks who failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import MalformedAnswer, Server, ServerError

Pause = Literal["retract", "abort"]
Bucket = list[tuple[str, Tensor]]
Body = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]
NewUpdate = Callable[[Sequence[str]], "Update"]

# For all calls that carry no weights: an engine that hangs must not hold the others paused for longer.
_CONTROL_S = 60.0


class WeightSyncError(RuntimeError):
    """Servers that did not take the weights.

    Attributes:
        failed: URL -> what went wrong; the other servers have the weights.
    """

    def __init__(self, message: str, failed: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.failed = dict(failed or {})


class Weights(Protocol):
    """A model's weights under their HF names. Every iteration streams the current values of all of them.

    Iterating and saving are collective over the trainer's ranks.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...

    def save(self, path: Path) -> None:
        """Write them as a complete HF directory that appears at once."""
        ...


class WeightSync(Protocol):
    """Carries weights from the trainer's ranks to servers."""

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        """Send the current weights to every server and have them call it `version`.

        Collective over the world; rank 0 talks to the servers. One failing server does not keep the others from
        their weights.

        Raises:
            WeightSyncError: the same on every rank, naming each server that failed.
        """
        ...

    def close(self) -> None:
        """Let go of groups and connections."""
        ...


class Update:
    """Rank 0's side of one update: every call goes to all servers at once, one that fails is left out from then on.

    A server goes through these states; weights read from disk come in one call and need no `begin` and `end`:

        serving --enter--> paused --begin--> open --post--> ... --end--> closed --exit--> serving

    Whatever happens, nobody is left behind in the middle: a server that failed, at whatever call, keeps its first error
    in `failed` and gets no more weights, but leaving the context closes what it has open and lets it continue. That it
    gets no requests before it has taken a whole update is the engine's and the pool's business.

    Args:
        urls: the servers.
        pause: what they do with requests under way.
        timeout_s: one call that carries weights to a server.
        api_key: bearer token, or None.
    """

    def __init__(self, urls: Sequence[str], *, pause: Pause, timeout_s: float, api_key: str | None) -> None:
        self.failed: dict[str, str] = {}
        self._begun: set[str] = set()
        self._pause = pause
        self._control_s = min(timeout_s, _CONTROL_S)
        self._servers = {url: Server(url, timeout_s, api_key) for url in urls}
        self._background = Background("bpdg-weights")

    @property
    def urls(self) -> list[str]:
        """Servers that have not failed."""
        return [url for url in self._servers if url not in self.failed]

    def __enter__(self) -> Self:
        for server in self._servers.values():
            self._background.run(server.__aenter__())
        self._control("/pause_generation", {"mode": self._pause})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Those that failed too: a server that refused an update must stay neither paused nor in the middle of it.
        # Those that may still have one open have failed already, or the caller's error is on its way: what they say to
        # closing it is no news. One that does not hear that it may continue stays paused, and that is.
        self._control("/end_weight_update", to=self._begun, heed=False)
        self._control("/continue_generation", to=self._servers)
        for server in self._servers.values():
            self._background.run(server.close())
        self._background.close()

    def begin(self) -> None:
        """Open the update of weights that come tensor by tensor."""
        # A trainer that died, or an attempt before this one, may have left one open, and a server has at most one: it
        # would refuse the next. Where none is open, it refuses to close it and nothing happens.
        self._control("/end_weight_update", heed=False)
        self._control("/begin_weight_update")
        self._begun = set(self.urls)

    def end(self) -> None:
        """Close it."""
        self._control("/end_weight_update")
        self._begun -= set(self.urls)

    def post(self, path: str, body: Body) -> None:
        """Call every server that has not failed; `body` may depend on the URL."""
        self.start(path, body)()

    def start(
        self,
        path: str,
        body: Body,
        *,
        timeout_s: float | None = None,
        to: Iterable[str] | None = None,
        heed: bool = True,
    ) -> Callable[[], None]:
        """As `post`, but returns at once; call what it returns to wait for the answers.

        Args:
            to: servers that are called; None: those that have not failed.
            heed: whether one that fails counts as failed from now on.
        """
        calls = {
            url: self._background.submit(self._call(url, path, dict(body(url) if callable(body) else body), timeout_s))
            for url in (self.urls if to is None else to)
        }

        def finish() -> None:
            for url, call in calls.items():
                try:
                    call.result()
                except ServerError as error:
                    if heed:
                        self.failed.setdefault(url, str(error))

        return finish

    def get(self, url: str, path: str) -> Any:
        """One server's answer.

        Raises:
            ServerError: see `Server.get`.
        """
        return self._background.run(self._servers[url].get(path, timeout_s=self._control_s))

    def places(self, first: int) -> dict[str, range]:
        """A place for each device of every engine, in a row from `first` on. One that does not say its size failed."""
        places = {}
        for url in self.urls:
            try:
                info = self.get(url, "/server_info")
                size = int(info["tp_size"]) * int(info.get("pp_size") or 1)
            except (ServerError, KeyError, TypeError) as error:
                self.failed[url] = f"{url}/server_info has no tensor-parallel size: {error}"
                continue
            places[url] = range(first, first + size)
            first += size
        return places

    def alive(self, url: str) -> bool:
        """Whether a server can be reached."""
        try:
            self.get(url, "/model_info")
        except ServerError:
            return False
        return True

    def check_version(self, version: str) -> None:
        """Count a server as failed that does not name its weights `version`."""
        for url in self.urls:
            try:
                found = self._background.run(self._servers[url].weight_version())
            except ServerError as error:
                self.failed[url] = str(error)
                continue
            if found != version:
                self.failed[url] = f"{url} took an update to {version!r} but says that its weights are {found!r}"

    def _control(
        self, path: str, body: Body | None = None, *, to: Iterable[str] | None = None, heed: bool = True
    ) -> None:
        self.start(path, body or {}, timeout_s=self._control_s, to=to, heed=heed)()

    async def _call(self, url: str, path: str, body: dict[str, Any], timeout_s: float | None) -> None:
        answer = await self._servers[url].post(path, body, timeout_s=timeout_s)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise MalformedAnswer(f"{url}{path}: {answer.get('message')}")


def share_outcome(failed: Mapping[str, str]) -> None:
    """Raise rank 0's failures on every rank. Collective over the world."""
    outcome = [dict(failed)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        listed = "\n".join(f"  {url}: {message}" for url, message in outcome[0].items())
        raise WeightSyncError(f"weight update failed:\n{listed}", outcome[0])


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Consecutive weights of at most `limit` bytes together (a larger one by itself), and whether they are the last.

    Each tensor owns its memory. One bucket and one more tensor are held at a time.
    """
    bucket: Bucket = []
    held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if bucket and held + size > limit:
            yield bucket, False
            bucket, held = [], 0
        bucket.append((name, tensor.clone(memory_format=torch.contiguous_format)))
        held += size
    yield bucket, True
