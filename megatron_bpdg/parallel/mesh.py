"""The process groups of a model, and where this rank stands in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        tensor: the ranks that share the matrices.
        context: the ranks that share the tokens of every sequence.
        stage: both together: the ranks of one pipeline stage of one replica.
        is_last_stage: whether hidden states and losses come out here.
        data_rank, data_size: which replica, out of how many.
    """

    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    stage: dist.ProcessGroup
    is_last_stage: bool
    data_rank: int
    data_size: int

    @classmethod
    def current(cls) -> Mesh:
        """Of the initialised Megatron-Core parallel state."""
        from megatron.core import parallel_state

        return cls(
            tensor=parallel_state.get_tensor_model_parallel_group(),
            context=parallel_state.get_context_parallel_group(),
            stage=parallel_state.get_tensor_and_context_parallel_group(),
            is_last_stage=parallel_state.is_pipeline_last_stage(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
        )

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its replica: the first one of the last stage."""
        return self.is_last_stage and self.stage.rank() == 0

    def owns(self, index: int) -> bool:
        """Whether this replica trains on the response of that place in the step's batch, for good."""
        return index % self.data_size == self.data_rank
