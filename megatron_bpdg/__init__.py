"""On-policy distillation with blockwise policy-drift gating on Megatron-Core.

The names here are the method and the parallel operations, for use in any trainer; importing them does not import
Megatron-Core. The trainer itself is `bpdg train` (`megatron_bpdg.training.loop`).
"""

from megatron_bpdg.drift import FixedBlocks, Gate, Gated, NewlineSpans, Partition, Segments, Signals, WholeSequence
from megatron_bpdg.objectives.divergence import forward_kl, jsd, reverse_kl
from megatron_bpdg.objectives.local_support import local_support_loss
from megatron_bpdg.objectives.sampled_token import sampled_token_loss
from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.sequence import sum_over
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

__all__ = [
    "DenseVocab",
    "FixedBlocks",
    "Gate",
    "Gated",
    "NewlineSpans",
    "ParallelVocab",
    "Partition",
    "Segments",
    "Signals",
    "TokenLayout",
    "VocabOps",
    "WholeSequence",
    "forward_kl",
    "jsd",
    "local_support_loss",
    "reverse_kl",
    "sampled_token_loss",
    "sum_over",
]
