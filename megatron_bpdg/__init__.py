"""On-policy distillation with blockwise policy-drift gating on Megatron-Core.

The names here are the method and the parallel operations, for use in any trainer; importing them does not import
Megatron-Core. The trainer itself is `bpdg train` (`megatron_bpdg.training.loop`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_bpdg.controllers.factor import Live, Prepared, plain, product
    from megatron_bpdg.drift.gate import Gate, Gated
    from megatron_bpdg.drift.partition import FixedBlocks, NewlineSpans, Partition, WholeSequence
    from megatron_bpdg.drift.signals import Factor, Segments, Signals
    from megatron_bpdg.objectives.divergence import forward_kl, jsd, reverse_kl
    from megatron_bpdg.objectives.local_support import local_support_loss
    from megatron_bpdg.objectives.sampled_token import sampled_token_loss
    from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
    from megatron_bpdg.parallel.sequence import sum_over
    from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

__version__ = "0.1.0"

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
    "__version__",
    "forward_kl",
    "jsd",
    "local_support_loss",
    "plain",
    "product",
    "reverse_kl",
    "sampled_token_loss",
    "sum_over",
]

# Looked up when asked for: every module here needs torch, which takes seconds that `bpdg --help` does not have.
_MODULES = (
    "controllers.factor",
    "drift.gate",
    "drift.partition",
    "drift.signals",
    "objectives.divergence",
    "objectives.local_support",
    "objectives.sampled_token",
    "objectives.vocabulary",
    "parallel.sequence",
    "parallel.vocab",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
