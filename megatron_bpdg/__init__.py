"""On-policy distillation with blockwise policy-drift gating on Megatron-Core.

The names here are the method and the parallel operations, for use in any trainer; importing them does not import
Megatron-Core. The trainer itself is `bpdg train` (`megatron_bpdg.training.loop`).
"""

from megatron_bpdg.controllers.factor import Live, Prepared, drop, plain, prepare, product, select, unit_mean
from megatron_bpdg.drift import (
    Factor,
    FixedBlocks,
    Gate,
    Gated,
    NewlineSpans,
    Partition,
    Segments,
    Signals,
    WholeSequence,
)
from megatron_bpdg.objectives.divergence import forward_kl, jsd, reverse_kl
from megatron_bpdg.objectives.local_support import local_support_loss
from megatron_bpdg.objectives.sampled_token import sampled_token_loss
from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.sequence import sum_over
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

__all__ = [
    "DenseVocab",
    "Factor",
    "FixedBlocks",
    "Gate",
    "Gated",
    "Live",
    "NewlineSpans",
    "ParallelVocab",
    "Partition",
    "Prepared",
    "Segments",
    "Signals",
    "TokenLayout",
    "VocabOps",
    "WholeSequence",
    "drop",
    "forward_kl",
    "jsd",
    "local_support_loss",
    "plain",
    "prepare",
    "product",
    "reverse_kl",
    "sampled_token_loss",
    "select",
    "sum_over",
    "unit_mean",
]
