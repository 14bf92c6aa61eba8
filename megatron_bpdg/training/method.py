"""From a config to the method: partition, objective."""

from __future__ import annotations

from typing import Any

from megatron_bpdg.config.schema import (
    Fixed,
    FullVocabulary,
    Newline,
    ObjectiveConfig,
    PartitionConfig,
    RunConfig,
    SampledToken,
    SequencePartition,
    SupervisedObjective,
    TeacherTopK,
    TokenPartition,
)
from megatron_bpdg.drift import FixedBlocks, NewlineSpans, Partition, WholeSequence, newline_token_ids, token_partition
from megatron_bpdg.objectives.objective import (
    FullVocabularyObjective,
    LocalSupportObjective,
    NegativeLogLikelihood,
    Objective,
    SampledTokenObjective,
)


def build_partition(config: PartitionConfig, tokenizer: Any) -> Partition:
    """The partition that a config section names."""
    match config:
        case Fixed():
            return FixedBlocks(config.size)
        case Newline():
            ids = newline_token_ids(tokenizer.decode, len(tokenizer))
            return NewlineSpans(ids, config.min_size, config.max_size)
        case TokenPartition():
            return token_partition()
        case SequencePartition():
            return WholeSequence()


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config section names."""
    fields = config.model_dump(exclude={"name"})
    match config:
        case SampledToken():
            return SampledTokenObjective(**fields)
        case TeacherTopK():
            return LocalSupportObjective(**fields)
        case FullVocabulary():
            return FullVocabularyObjective(config.name, **fields)
        case SupervisedObjective():
            return NegativeLogLikelihood()


def check_objective(cfg: RunConfig, objective: Objective) -> None:
    """Whether head and teacher of the config give what the objective reads.

    A server gives log-probs of given tokens at temperature 1, and of the K most likely ids.

    Raises:
        ValueError: naming the fields that do not go together.
    """
    name, needs = cfg.objective.name, objective.needs
    if needs.full and cfg.training.head in ("chunked", "fused"):
        raise ValueError(
            f"training.head: {cfg.training.head} never makes the logits, and objective.name: {name} is a sum over the "
            "whole vocabulary: set training.head to auto or materialised"
        )
    if cfg.teacher is None or cfg.teacher.engine != "sglang":
        return
    if needs.full:
        raise ValueError(
            f"objective.name: {name} needs the teacher's whole distribution, and teacher.engine: sglang gives its top "
            "K: use objective.name: lsm, or teacher.engine: megatron"
        )
    temperature = cfg.rollout.sampling.temperature
    if temperature != 1.0 and needs.normalised:
        raise ValueError(
            f"rollout.sampling.temperature = {temperature:g} with teacher.engine: sglang: servers score given "
            "tokens at temperature 1 only, which is enough for objective.name: lsm with outside: renormalise; use "
            "that, temperature 1, or teacher.engine: megatron"
        )
