"""From hidden states to operations on the predicted distributions, with the gradients each layout needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import VocabOps
from megatron_bpdg.parallel.chunked import ChunkedVocab
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout


def response_states(
    hidden_SBH: Tensor, position_N: Tensor, *, group: dist.ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """Hidden states of N positions, ``[N, H]``, on every rank of the group.

    A product with a shard of the head gives each rank a *partial* gradient of the hidden states; it is summed over the
    group exactly once: by the reduce-scatter that is the backward of the sequence-parallel gather, or by the all-reduce
    that is the backward of the copy.

    Args:
        hidden_SBH: normed hidden states, ``[S / TP, B, H]`` under sequence parallelism, else ``[S, B, H]``.
        position_N: int64 ``[N]``, flat positions ``s * B + b`` in the full sequence.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True, group=group)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    return hidden_SBH.flatten(0, 1).index_select(0, position_N)


HeadKind = Literal["materialised", "chunked", "fused"]


@dataclass(frozen=True)
class Head:
    """How the loss reads the vocabulary.

    Attributes:
        kind: `materialised` makes the logits ``[N, V_padded / TP]``; `chunked` never does, and has no distribution
            over the whole vocabulary; `fused` is `chunked` with Triton kernels, on GPUs only.
        chunk_mb, keep_mb: see `ChunkedVocab`; the fused sweep keeps nothing.
    """

    kind: HeadKind = "chunked"
    chunk_mb: float = 128.0
    keep_mb: float = 0.0

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError where this head cannot run."""
        if self.kind == "fused" and device.type != "cuda":
            raise ValueError(
                "training.head: fused has Triton kernels for CUDA devices only, and there is none: use auto"
            )
        if self.kind == "fused" and importlib.util.find_spec("triton") is None:
            raise ValueError("training.head: fused needs Triton, which is not installed: pip install triton")

    def vocab_ops(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        vocab_size: int,
        layout: TokenLayout,
        temperature: float,
        *,
        accumulate: bool,
    ) -> VocabOps:
        """Operations on the distributions that N hidden states predict.

        Args:
            hidden_NH: of `response_states`.
            weight_VH: this rank's rows of the head.
            accumulate: add the weight's gradient to its main gradient (without logits only).
        """
        if self.kind == "materialised":
            return ParallelVocab(hidden_NH @ weight_VH.t(), vocab_size, layout, temperature)
        make = ChunkedVocab
        if self.kind == "fused":
            # Triton comes with torch where there is CUDA, and only there.
            from megatron_bpdg.parallel.fused import FusedVocab

            make = FusedVocab
        return make(
            hidden_NH,
            weight_VH,
            vocab_size,
            layout,
            temperature,
            chunk_mb=self.chunk_mb,
            keep_mb=self.keep_mb,
            accumulate=accumulate,
        )
