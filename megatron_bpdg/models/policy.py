"""A Megatron model with the process groups it lives on: run micro-batches through it, forward or both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.data.batch import MicroBatch, collate
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.qwen3 import HiddenStateGPTModel, ModelShape
from megatron_bpdg.objectives.vocabulary import VocabOps
from megatron_bpdg.parallel.head import Head, response_states
from megatron_bpdg.parallel.mesh import Mesh
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.vocab import TokenLayout


@dataclass(eq=False)
class MegatronPolicy:
    """A model on its ranks. `loss` and `read` functions see hidden states and the head, never the model.

    Attributes:
        module: this rank's stage, by itself or wrapped in Megatron-Core's DistributedDataParallel.
        shape: of the whole model.
        packed: lay the sequences of a micro-batch one after the other instead of padding them.
        head: how the vocabulary is read.
    """

    module: nn.Module
    shape: ModelShape
    layout: Layout
    _: KW_ONLY
    packed: bool = False
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        self.head.check_device(default_device())
        self.mesh = Mesh.current()

    @property
    def unwrapped(self) -> HiddenStateGPTModel:
        return unwrap_model(self.module)

    def vocab_ops(self, hidden_SBH: Tensor, batch: MicroBatch, temperature: float, *, scattered: bool) -> VocabOps:
        """The distribution that predicts each response token, as vocabulary operations over this rank's shard.

        Args:
            scattered: keep only this rank's slice of the per-token results.
        """
        hidden_NH = response_states(
            hidden_SBH, batch.position_N, group=self.mesh.tensor, sequence_parallel=self.layout.sequence_parallel
        )
        return self.head.vocab_ops(
            hidden_NH,
            self.unwrapped.head_weight(),
            self.shape.vocab_size,
            TokenLayout(self.mesh.tensor, scattered),
            temperature,
            accumulate=self.unwrapped.config.gradient_accumulation_fusion and torch.is_grad_enabled(),
        )

    def forward_backward(self, batches: Sequence[MicroBatch], loss: Callable[[Tensor, MicroBatch], Tensor]) -> None:
        """Accumulate the gradient of the sum of `loss(hidden_SBH, batch)` over the micro-batches."""

        def loss_func(batch: MicroBatch, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            # Megatron-Core adds token counts up in an int tensor and divides the gradients by it: a denominator that is
            # a float, as the mass of gated tokens is, would lose its fraction there. It is told of no tokens, and the
            # caller divides, once and exactly.
            return loss(hidden_SBH, batch), torch.zeros((), dtype=torch.int, device=hidden_SBH.device), {}

        self._run(batches, loss_func, forward_only=False)

    @torch.no_grad()
    def forward(self, batches: Sequence[MicroBatch], read: Callable[[Tensor, MicroBatch], Any]) -> list[Any]:
        """`read(hidden_SBH, batch)` of each micro-batch on the last pipeline stage; an empty list elsewhere."""

        def collect(batch: MicroBatch, hidden_SBH: Tensor, non_loss_data: bool = True) -> Any:
            return read(hidden_SBH, batch)

        training = self.module.training
        self.module.eval()
        results = self._run(batches, collect, forward_only=True)[: len(batches)]
        self.module.train(training)
        return results if self.mesh.is_last_stage else []

    def _in_step(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches on every rank: tokens go to experts on other replicas, which have to be there too."""
        if self.shape.experts is None or self.layout.expert_parallel * self.layout.expert_tensor_parallel == 1:
            return list(batches)
        most = torch.tensor(len(batches), device=default_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [*batches, *to_batches([[]] * (int(most) - len(batches)), self)]

    def _run(self, batches: Sequence[MicroBatch], on_output: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        device = default_device()
        batches = self._in_step(batches)

        def forward_step(batch_iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
            batch = next(batch_iterator).to(device)
            hidden_SBH = model(batch.input_ids_BS, batch.position_ids_BS, None, packed_seq_params=_packing(batch))
            return hidden_SBH, partial(on_output, batch)

        # Sequence length and micro-batch size vary; with pipeline stages, shapes travel along (variable_seq_lengths).
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.module,
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids_BS.shape[1],
            micro_batch_size=batches[0].input_ids_BS.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _packing(batch: MicroBatch) -> PackedSeqParams | None:
    """How Megatron-Core and Transformer Engine are told of packed sequences.

    Padding counts as part of its sequence: it comes last, where causal attention never looks.
    """
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def to_batches(chunks: Sequence[Sequence[Trajectory]], policy: MegatronPolicy) -> list[MicroBatch]:
    """Collate micro-batches for a model's layout: this rank's part of them."""
    return [
        collate(
            chunk,
            pad_id=0,
            length_multiple=policy.layout.tensor_parallel if policy.layout.sequence_parallel else 1,
            token_multiple=policy.layout.tensor_parallel,
            packed=policy.packed,
            context_rank=policy.mesh.context.rank(),
            context_size=policy.layout.context_parallel,
        )
        for chunk in chunks
    ]
