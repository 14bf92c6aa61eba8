"""What the trainer needs of whatever samples responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.serving.sglang.weights.base import Weights


@dataclass(frozen=True)
class Response:
    """Sampled tokens. R = sampled tokens.

    Attributes:
        ids: the end-of-sequence token included when it was sampled.
        logprobs: float32 ``[R]``, under the full distribution at the sampling temperature.
        finished: whether it ended by itself.
        version_R: the trainer's step whose weights sampled each token, int32. Where a server does not say it token by
            token and its weights changed on the way, the step of the older weights.
        cut_off: it was interrupted before its end or its length limit, and can be gone on with.
    """

    ids: list[int]
    logprobs: Tensor
    finished: bool
    version_R: Tensor
    cut_off: bool = False

    @classmethod
    def empty(cls) -> Response:
        """One that has not started."""
        return cls([], torch.zeros(0), False, torch.zeros(0, dtype=torch.int32), cut_off=True)


@dataclass(frozen=True)
class Request:
    """One response to be sampled. `seed` fixes the result where the engine can; `started` is gone on with."""

    prompt_ids: list[int]
    seed: int
    started: Response | None = None


@dataclass(frozen=True)
class Probe:
    """What the new weights say about a fixed text, to check a sampler's copy of them with. T = tokens.

    Attributes:
        ids: T + 1 token ids.
        logprobs_T: log-probs of all but the first at temperature 1, float32.
        tolerance: largest mean absolute difference of right weights, nats.
    """

    ids: list[int]
    logprobs_T: Tensor
    tolerance: float


Finished = list[tuple[int, Response]]
"""Responses that have just been finished, each with the index of its request."""


class RolloutStream(Protocol):
    """Responses as they finish. Iterating and interrupting are collective over the run's ranks."""

    def __iter__(self) -> Iterator[Finished]: ...

    def interrupt(self) -> Finished:
        """Cut off what is not finished and return it as it is, started or not."""


class RolloutEngine(Protocol):
    """Samples responses from the newest weights it was given. All methods are collective over the run's ranks.

    Attributes:
        retries: requests sent again so far, over all ranks.
    """

    retries: int

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> RolloutStream:
        """Start sampling; the stream gives the same on every rank."""

    def load_weights(self, weights: Weights, version: int, probe: Probe | None) -> None:
        """Take new weights and remember their version. Engines that are sent their weights check them with `probe`."""

    def close(self) -> None:
        """Let go of connections and threads."""


def generate(
    engine: RolloutEngine,
    requests: Sequence[Request],
    sampling: Sampling,
    advance: Callable[[Iterable[Response]], None] | None = None,
) -> list[Response]:
    """All responses in the order of their requests, the same on every rank.

    Args:
        advance: told of responses as they finish, for a progress bar.
    """
    done: dict[int, Response] = {}
    for finished in engine.stream(requests, sampling):
        done.update(finished)
        if advance is not None:
            advance([response for _, response in finished])
    return [done[index] for index in range(len(requests))]
