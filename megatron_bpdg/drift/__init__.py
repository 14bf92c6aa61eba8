"""Blockwise policy-drift gating: partitions, the gate, diagnostics. Plain tensors, no process groups."""

from megatron_bpdg.drift.gate import AGGREGATORS, Gate, Gated
from megatron_bpdg.drift.partition import (
    FixedBlocks,
    NewlineSpans,
    Partition,
    WholeSequence,
    newline_token_ids,
    token_partition,
)
from megatron_bpdg.drift.signals import Factor, Segments, Signals, SumReduce, TeacherSignal, no_reduce, segment_mean

__all__ = [
    "AGGREGATORS",
    "Factor",
    "FixedBlocks",
    "Gate",
    "Gated",
    "NewlineSpans",
    "Partition",
    "Segments",
    "Signals",
    "SumReduce",
    "TeacherSignal",
    "WholeSequence",
    "newline_token_ids",
    "no_reduce",
    "segment_mean",
    "token_partition",
]
