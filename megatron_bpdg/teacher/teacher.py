"""What the trainer needs of whatever scores responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_bpdg.data.trajectory import Trajectory


class Teacher(Protocol):
    """Says how likely the teacher finds sampled responses. Methods are collective over the run's ranks."""

    def prefetch(self, trajectories: Sequence[Trajectory]) -> None:
        """Hear of responses that `score` will be asked about; may begin with them. Not collective."""

    def score(self, micro_batches: Sequence[Sequence[Trajectory]]) -> None:
        """Fill in the teacher fields of every trajectory, on all ranks of the last stage."""

    def close(self) -> None:
        """Let go of connections and threads."""
