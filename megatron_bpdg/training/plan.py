"""Who learns from which response in which update of a step. `loop` plans; teacher, behaviour and updater follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.batch import by_tokens
from megatron_bpdg.data.sampler import Stream
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.parallel.mesh import Mesh


@dataclass(frozen=True)
class Update:
    """One optimizer update.

    Attributes:
        epoch: how often the step's responses have been gone through before.
        micro_batches: this replica's; a single empty one where it has none of the responses, so that it takes part.
    """

    epoch: int
    micro_batches: list[list[Trajectory]]


def plan_updates(trajectories: Sequence[Trajectory], cfg: RunConfig, mesh: Mesh, step: int) -> list[Update]:
    """All optimizer updates of a step, in order.

    Which responses share an update depends on the seed, the step and the epoch, never on the layout: a response
    belongs to one replica for good (`Mesh.owns`), so a replica may have more or fewer of an update than another. The
    first epoch keeps the sampled order: the old log-probs are computed in the very micro-batches of the first update,
    which therefore has gates of exactly 1. Where dropped responses leave fewer than there are mini-batches, there are
    fewer updates.
    """
    updates = []
    for epoch in range(cfg.training.epochs):
        order = np.arange(len(trajectories))
        if epoch > 0:
            order = np.random.default_rng([cfg.seed, Stream.SHUFFLE, step, epoch]).permutation(order)
        for chosen in np.array_split(order, min(cfg.training.minibatches, len(order))):
            updates.append(Update(epoch, micro_batches([trajectories[i] for i in chosen], cfg, mesh)))
    return updates


def first_pass(updates: Sequence[Update]) -> list[list[Trajectory]]:
    """The micro-batches of the first epoch: each of this replica's responses once."""
    return [chunk for update in updates if update.epoch == 0 for chunk in update.micro_batches]


def micro_batches(trajectories: Sequence[Trajectory], cfg: RunConfig, mesh: Mesh) -> list[list[Trajectory]]:
    """This replica's responses out of one update's, by number of sequences or, packed, of tokens."""
    mine = [trajectory for trajectory in trajectories if mesh.owns(trajectory.index)]
    size, tokens = cfg.training.micro_batch_size, cfg.training.micro_batch_tokens
    if tokens is not None:
        chunks = by_tokens(mine, tokens * cfg.layout.context_parallel)
    else:
        chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    return chunks or [[]]
