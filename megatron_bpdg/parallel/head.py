"""From hidden states to the logits of chosen positions, with the gradients each layout needs."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


def project(
    hidden_SBH: Tensor, weight_VH: Tensor, position_N: Tensor, *, group: dist.ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """Logits of N positions over this rank's vocabulary rows, ``[N, V_local]``.

    A matrix product with a shard of the head gives each rank a *partial* gradient of the hidden states; it is summed
    over the group exactly once: by the reduce-scatter that is the backward of the sequence-parallel gather, or by the
    all-reduce that is the backward of the copy.

    Args:
        hidden_SBH: normed hidden states, ``[S / TP, B, H]`` under sequence parallelism, else ``[S, B, H]``.
        weight_VH: this rank's rows of the head.
        position_N: int64 ``[N]``, flat positions ``s * B + b`` in the full sequence.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True, group=group)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    hidden_NH = hidden_SBH.flatten(0, 1).index_select(0, position_N)
    return hidden_NH @ weight_VH.t()
