"""Which problems each step trains on: seeded, without repeats within an epoch, whatever was asked before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Sets apart the random streams that come from a run's one seed."""

    ROLLOUT = 1
    SHUFFLE = 2
    EVALUATION = 3


class PromptSampler:
    """Goes through a new seeded permutation of the problems, which are numbered from 0, every epoch.

    A batch may straddle two epochs; the new epoch's order then puts off the problems that the batch already has, so no
    batch has a problem twice. What `batch` returns depends on the arguments alone, not on earlier calls.

    Raises:
        ValueError: a batch of `per_step` does not fit into the problems, or the seed is negative.
    """

    def __init__(self, num_problems: int, per_step: int, seed: int) -> None:
        if not 1 <= per_step <= num_problems:
            raise ValueError(
                f"cannot draw {per_step} different problems per step from {num_problems}: change "
                "rollout.prompts_per_step (training.batch_size for kind: sft) or the number of problems"
            )
        if seed < 0:
            raise ValueError(f"seed = {seed} must not be negative")
        self.num_problems, self.per_step, self.seed = num_problems, per_step, seed
        self._orders = [self._permutation(0)]

    def batch(self, step: int) -> list[int]:
        """Indices of the problems of `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step = {step} must not be negative")
        epoch, start = divmod(step * self.per_step, self.num_problems)
        indices = self._order_of(epoch)[start : start + self.per_step]
        if (missing := self.per_step - len(indices)) > 0:
            indices = np.concatenate([indices, self._order_of(epoch + 1)[:missing]])
        return [int(index) for index in indices]

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        # All are kept, as an epoch's order builds on the one before: 8 bytes a problem and epoch.
        while len(self._orders) <= epoch:
            self._orders.append(self._following(len(self._orders), self._orders[-1]))
        return self._orders[epoch]

    def _following(self, epoch: int, previous: NDArray[np.int64]) -> NDArray[np.int64]:
        order = self._permutation(epoch)
        shared = epoch * self.num_problems % self.per_step  # problems of the straddling batch in the previous epoch
        if not shared:
            return order
        clashes = np.isin(order, previous[-shared:])
        first = order[~clashes][: self.per_step - shared]
        return np.concatenate([first, order[~np.isin(order, first)]])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_problems)
