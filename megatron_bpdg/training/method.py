"""From a config to the method: partition, gate, other factors, objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.config.objective import (
    FullVocabulary,
    ObjectiveConfig,
    SampledToken,
    SupervisedObjective,
    TeacherTopK,
)
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.config.user import UserClass
from megatron_bpdg.config.weights import Fixed, GateConfig, Newline, PartitionConfig, SequencePartition, TokenPartition
from megatron_bpdg.controllers.factor import Live, Prepared
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.partition import FixedBlocks, NewlineSpans, Partition, WholeSequence, newline_token_ids
from megatron_bpdg.objectives.objective import (
    FullVocabularyObjective,
    LocalSupportObjective,
    NegativeLogLikelihood,
    Objective,
    SampledTokenObjective,
)

_PARTITION = "gate.partition.name = %r: it returned something else than block numbers 0, 1, ... (int64)"


def build_partition(config: PartitionConfig, tokenizer: Any) -> Partition:
    """The partition that a config section names."""
    match config:
        case Fixed():
            return FixedBlocks(config.size)
        case Newline():
            ids = newline_token_ids(tokenizer.decode, len(tokenizer))
            return NewlineSpans(ids, config.min_size, config.max_size)
        case TokenPartition():
            return FixedBlocks(1)
        case SequencePartition():
            return WholeSequence()
        case UserClass():
            return _checked(config.make(), config.name)


def _checked(partition: Partition, name: str) -> Partition:
    def blocks(response_R: Tensor) -> Tensor:
        block_R = partition(response_R)
        if block_R.shape != response_R.shape or block_R.dtype != torch.int64 or block_R[:1].any():
            raise ValueError(f"{_PARTITION % name}, one for each of {len(response_R)} tokens")
        if bool((block_R.diff() < 0).any() | (block_R.diff() > 1).any()):
            raise ValueError(f"{_PARTITION % name}, each as large as the one before or one larger")
        return block_R

    return blocks


def build_gate(cfg: RunConfig) -> Gate:
    """The run's gate; without one, the gate that measures drift and weighs all tokens alike."""
    return Gate(**(cfg.drift_gate or GateConfig(tau=0.0)).model_dump(exclude={"name", "partition"}))


def build_factors(cfg: RunConfig) -> tuple[list[Live], list[Prepared]]:
    """The user's own factors, by stage: those with a method `prepare`, and those that are called.

    Raises:
        ValueError: naming the field, where it is neither.
    """
    live: list[Live] = []
    prepared: list[Prepared] = []
    for place, config in enumerate(cfg.weights):
        if not isinstance(config, UserClass):
            continue
        factor = config.make()
        if hasattr(factor, "prepare"):
            prepared.append(factor)
        elif callable(factor):
            live.append(factor)
        else:
            raise ValueError(
                f"weights.{place}.name = {config.name!r}: give it a method `prepare(responses, reduce)`, or make its "
                "instances callable with the signals of a micro-batch"
            )
    return live, prepared


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config section names."""
    fields = config.model_dump(exclude={"name", "args"})
    match config:
        case SampledToken():
            return SampledTokenObjective(**fields)
        case TeacherTopK():
            return LocalSupportObjective(**fields)
        case FullVocabulary():
            return FullVocabularyObjective(config.name, **fields)
        case SupervisedObjective():
            return NegativeLogLikelihood()
        case UserClass():
            objective: Objective = config.make()
            if lacking := [x for x in ("needs", "differentiates_logprob", "__call__") if not hasattr(objective, x)]:
                raise ValueError(
                    f"objective.name = {config.name!r} lacks {', '.join(lacking)}: see "
                    "megatron_bpdg.objectives.objective.Objective"
                )
            return objective
