"""What all ways of sending weights share: pausing, telling several servers at once, and who failed.

`DiskSync`, `TensorSync` and `DistributedSync` make one `Update` per push, on rank 0, which alone calls the servers;
`raise_failed` then tells all ranks who failed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from megatron_bpdg.config.rollout import WeightSync as WeightSyncConfig
from megatron_bpdg.parallel.together import on_first
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import Answer, MalformedAnswer, Server, ServerError, ask_each

Bucket = list[tuple[str, Tensor]]
Body = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]
Question = Callable[[Server], Awaitable[Answer]]

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


class WeightSync(ABC):
    """Carries weights from the trainer's ranks to servers.

    Args:
        cfg: the section `rollout.weight_sync`.
        output: the run's directory, where weights lie that have no directory of their own.
        api_key: bearer token of the servers, or None.
    """

    def __init__(self, cfg: WeightSyncConfig, output: Path, api_key: str | None = None) -> None:
        self.cfg, self.output, self.api_key = cfg, output, api_key

    def update(self, urls: Sequence[str]) -> Update:
        """A new update of some servers, for rank 0."""
        return Update(urls, pause=self.cfg.pause, timeout_s=self.cfg.timeout_s, api_key=self.api_key)

    @abstractmethod
    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        """Send the current weights to every server and have them call it `version`.

        Collective over the world; rank 0 talks to the servers. One failing server does not keep the others from
        their weights.

        Raises:
            WeightSyncError: the same on every rank, naming each server that failed.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of what is held between updates, if anything."""


@dataclass
class Update:
    """Rank 0's side of one update: every call goes to all servers at once, one that fails is left out from then on.

    A server goes through these states; weights read from disk come in one call and need no `begin` and `end`:

        serving --enter--> paused --begin--> open --post--> ... --end--> closed --exit--> serving

    Whatever happens, nobody is left behind in the middle: a server that failed, at whatever call, keeps its first error
    in `failed` and gets no more weights, but leaving the context closes what it has open and lets it continue. That it
    gets no requests before it has taken a whole update is the engine's and the pool's business.

    Args:
        servers: URLs.
        pause: what they do with requests under way.
        timeout_s: one call that carries weights to a server.
        api_key: bearer token, or None.
    """

    servers: Sequence[str]
    _: KW_ONLY
    pause: str
    timeout_s: float
    api_key: str | None
    failed: dict[str, str] = field(default_factory=dict, init=False)
    _begun: set[str] = field(default_factory=set, init=False)
    _background: Background = field(default_factory=lambda: Background("bpdg-weights"), init=False)

    @property
    def urls(self) -> list[str]:
        """Servers that have not failed."""
        return [url for url in self.servers if url not in self.failed]

    def __enter__(self) -> Self:
        self.ask(posting("/pause_generation", {"mode": self.pause}))
        return self

    def __exit__(self, *_: object) -> None:
        # Those that failed too: a server that refused an update must stay neither paused nor in the middle of it.
        # Those that may still have one open have failed already, or the caller's error is on its way: what they say to
        # closing it is no news. One that does not hear that it may continue stays paused, and that is.
        self.ask(posting("/end_weight_update"), to=self._begun, heed=False)
        self.ask(posting("/continue_generation"), to=self.servers)
        self._background.close()

    def begin(self) -> None:
        """Open the update of weights that come tensor by tensor."""
        # A trainer that died, or an attempt before this one, may have left one open, and a server has at most one: it
        # would refuse the next. Where none is open, it refuses to close it and nothing happens.
        self.ask(posting("/end_weight_update"), heed=False)
        self.ask(posting("/begin_weight_update"))
        self._begun = set(self.urls)

    def end(self) -> None:
        """Close it."""
        self.ask(posting("/end_weight_update"))
        self._begun -= set(self.urls)

    def post(self, path: str, body: Body) -> None:
        """Send every server its weights."""
        self.start(posting(path, body))()

    def ask(
        self, question: Question[Answer], *, to: Iterable[str] | None = None, heed: bool = True
    ) -> dict[str, Answer]:
        """As `start`, for what carries no weights, and the answers themselves."""
        return self.start(question, timeout_s=min(self.timeout_s, _CONTROL_S), to=to, heed=heed)()

    def start(
        self,
        question: Question[Answer],
        *,
        timeout_s: float | None = None,
        to: Iterable[str] | None = None,
        heed: bool = True,
    ) -> Callable[[], dict[str, Answer]]:
        """Ask servers without waiting for them; call what it returns to wait for the answers of those that gave one.

        Args:
            to: servers that are asked; None: those that have not failed.
            heed: whether one that fails counts as failed from now on.
        """
        urls = self.urls if to is None else to
        asked = self._background.submit(ask_each(urls, self.api_key, question, timeout_s or self.timeout_s))

        def finish() -> dict[str, Answer]:
            answers = {}
            for url, answer in asked.result().items():
                if not isinstance(answer, ServerError):
                    answers[url] = answer
                elif heed:
                    self.failed.setdefault(url, str(answer))
            return answers

        return finish

    def places(self, first: int) -> dict[str, range]:
        """A place for each device of every engine, in a row from `first` on. One that does not say its size failed."""

        async def size(server: Server) -> int:
            try:
                info = await server.get("/server_info")
                return int(info["tp_size"]) * int(info.get("pp_size") or 1)
            except (ServerError, KeyError, TypeError) as error:
                raise MalformedAnswer(f"{server.url}/server_info has no tensor-parallel size: {error}") from error

        places = {}
        for url, devices in self.ask(size).items():
            places[url] = range(first, first + devices)
            first += devices
        return places

    def check_version(self, version: str) -> None:
        """Count a server as failed that does not name its weights `version`."""
        for url, found in self.ask(Server.weight_version).items():
            if found != version:
                self.failed[url] = f"{url} took an update to {version!r} but says that its weights are {found!r}"


def posting(path: str, body: Body = MappingProxyType({})) -> Question[None]:
    """For `Update`: a call that a server may also answer with `success: false`; `body` may depend on the URL."""

    async def post(server: Server) -> None:
        answer = await server.post(path, dict(body(server.url) if callable(body) else body))
        if isinstance(answer, dict) and answer.get("success") is False:
            raise MalformedAnswer(f"{server.url}{path}: {answer.get('message')}")

    return post


def raise_failed(failed: Mapping[str, str]) -> None:
    """Raise rank 0's failures on every rank. Collective over the world."""
    if failed := on_first(lambda: dict(failed)):
        listed = "\n".join(f"  {url}: {message}" for url, message in failed.items())
        raise WeightSyncError(f"weight update failed:\n{listed}", failed)


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
