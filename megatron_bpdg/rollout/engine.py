"""What the trainer needs of whatever samples responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_bpdg.config.schema import Sampling


@dataclass(frozen=True)
class Request:
    """One response to be sampled. `seed` fixes the result."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Response:
    """Sampled tokens (the end-of-sequence token included when it was sampled) and their log-probs, float32 ``[R]``."""

    ids: list[int]
    logprobs: Tensor
    finished: bool
    weight_version: int


class RolloutEngine(Protocol):
    """Samples responses from the newest weights it was given. All methods are collective over the run's ranks."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] | None = None
    ) -> list[Response]:
        """Responses in the order of the requests, the same on every rank.

        Args:
            advance: told how many more responses are done, for a progress bar.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights (HF names, full tensors) and remember their version."""
        ...
