"""How model and tokens are spread over ranks."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section


class Layout(Section):
    """How model and tokens are spread over ranks; tensor x pipeline x context x data parallel is their number."""

    tensor_parallel: int = Field(1, ge=1, description="ranks that share each layer's matrices and the vocabulary")
    pipeline_parallel: int = Field(1, ge=1, description="ranks that share the stack of layers")
    context_parallel: int = Field(
        1, ge=1, description="ranks that share each sequence's tokens, attention included; for long responses"
    )
    data_parallel: int = Field(1, ge=1, description="replicas of the model")
    expert_parallel: int = Field(
        1,
        ge=1,
        description="ranks that share the experts of a layer, out of the tensor-, context- and data-parallel ones; "
        "dense models take no notice",
    )
    expert_tensor_parallel: int = Field(
        1, ge=1, description="ranks that share each expert's matrices, out of the same ones"
    )
    sequence_parallel: bool = Field(
        False, description="shard activations between tensor-parallel regions along the sequence"
    )
    distributed_optimizer: bool = Field(False, description="shard optimizer state over the data-parallel ranks")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @model_validator(mode="after")
    def _sequence_parallel_needs_tp(self) -> Layout:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel: true needs tensor_parallel > 1; set one of the two")
        return self

    @model_validator(mode="after")
    def _experts_divide_the_ranks(self) -> Layout:
        ranks = self.tensor_parallel * self.context_parallel * self.data_parallel
        wanted = self.expert_parallel * self.expert_tensor_parallel
        if ranks % wanted:
            raise ValueError(
                f"expert_parallel x expert_tensor_parallel = {self.expert_parallel} x {self.expert_tensor_parallel} = "
                f"{wanted} must divide tensor_parallel x context_parallel x data_parallel = {self.tensor_parallel} x "
                f"{self.context_parallel} x {self.data_parallel} = {ranks}: experts are spread over those ranks"
            )
        return self
