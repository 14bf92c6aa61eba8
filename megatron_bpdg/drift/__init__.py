"""Blockwise policy-drift gating: partitions, the gate, diagnostics. Plain tensors, no process groups."""

from megatron_bpdg.drift.gate import AGGREGATORS, Gate, Gated, SumReduce, no_reduce, segment_mean
from megatron_bpdg.drift.partition import (
    FixedBlocks,
    NewlineSpans,
    Partition,
    WholeSequence,
    newline_token_ids,
    token_partition,
)

__all__ = [
    "AGGREGATORS",
    "FixedBlocks",
    "Gate",
    "Gated",
    "NewlineSpans",
    "Partition",
    "SumReduce",
    "WholeSequence",
    "newline_token_ids",
    "no_reduce",
    "segment_mean",
    "token_partition",
]
