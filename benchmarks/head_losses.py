"""What benchmarks/head.py measures: the same gated losses by different heads, and the matrix products they need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import Segments, Signals
from megatron_bpdg.objectives.divergence import reverse_kl
from megatron_bpdg.objectives.local_support import local_support_loss
from megatron_bpdg.objectives.vocabulary import DenseVocab, VocabOps
from megatron_bpdg.parallel.head import Head
from megatron_bpdg.parallel.vocab import TokenLayout

BLOCK = 64
NOT_A_GATED_LOSS = "returns one scalar for the batch and takes no weights per token: it cannot be gated"


@dataclass(frozen=True)
class Inputs:
    """One shard's share of a micro-batch: T tokens, V / shards rows of the head."""

    hidden_NH: Tensor
    weight_VH: Tensor
    sampled_N: Tensor
    support_NK: Tensor
    teacher_logprobs_NK: Tensor
    old_logprobs_N: Tensor
    block_N: Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, vocab: int, k: int, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(std)

        def ids(*shape: int) -> Tensor:
            # Zipf's law, roughly: supports share their frequent ids, which a scatter notices.
            uniform = torch.rand(*shape, generator=generator, device=device)
            return (vocab**uniform - 1).long().clamp(max=vocab - 1)

        return cls(
            hidden_NH=normal(tokens, hidden).requires_grad_(),
            weight_VH=normal(vocab, hidden, std=hidden**-0.5).requires_grad_(),
            sampled_N=ids(tokens),
            support_NK=ids(tokens, k),
            teacher_logprobs_NK=normal(tokens, k).float().log_softmax(1),
            old_logprobs_N=normal(tokens).float() - 8.0,
            block_N=torch.arange(tokens, device=device) // BLOCK,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VH)

    def gate(self, logprobs_N: Tensor) -> Tensor:
        """Weights of the tokens, through the drift and the blocks."""
        everything_N = torch.ones_like(self.block_N, dtype=torch.bool)
        num_blocks = int(self.block_N.numel() - 1) // BLOCK + 1
        signals = Signals(
            logprobs_N,
            self.old_logprobs_N,
            everything_N,
            blocks=Segments(self.block_N, num_blocks),
            sequences=Segments(self.block_N * 0, 1),
        )
        return Gate()(signals).weight_n


Loss = Callable[[Inputs], Tensor]
# Largest difference to float64, over the largest entry: roundings of the dtype, not formulas.
GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def sampled_loss(ops: VocabOps, inputs: Inputs) -> Tensor:
    logprobs_N = ops.logprob(inputs.sampled_N)
    return -(inputs.gate(logprobs_N) * logprobs_N).sum()


def lsm_loss(ops: VocabOps, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        weight_N = inputs.gate(ops.logprob(inputs.sampled_N))
    return (weight_N * local_support_loss(ops, inputs.support_NK, inputs.teacher_logprobs_NK, reverse_kl)).sum()


LOSSES: dict[str, Callable[[VocabOps, Inputs], Tensor]] = {"sampled": sampled_loss, "lsm": lsm_loss}


def build(name: str, objective: str, chunk_mb: float, keep_mb: float) -> Loss:
    """The named implementation of an objective.

    Raises:
        LookupError: it does not exist here; the message says why.
    """
    loss = LOSSES[objective]

    def ours(inputs: Inputs) -> Tensor:
        assert dist.group.WORLD is not None
        head = Head(name, chunk_mb, keep_mb)  # type: ignore[arg-type]
        layout = TokenLayout(dist.group.WORLD)
        states, weight = inputs.hidden_NH, inputs.weight_VH
        return loss(head.vocab_ops(states, weight, inputs.vocab_size, layout, 1.0, accumulate=False), inputs)

    def dense(inputs: Inputs) -> Tensor:
        return loss(DenseVocab(inputs.hidden_NH @ inputs.weight_VH.t(), inputs.vocab_size), inputs)

    if name in ("materialised", "chunked"):
        return ours
    if name == "fused":
        if not torch.cuda.is_available():
            raise LookupError("needs a GPU")
        return ours
    if name == "torch":
        return dense
    if name == "compiled":
        return _compiled(objective)
    if name == "megatron":
        return _megatron(objective)
    if name == "liger":
        return _liger(objective)
    raise LookupError(f"no implementation of this name: {name}")


def gradient_error(loss: Loss, objective: str, dtype: torch.dtype, device: str) -> float:
    """Of the hidden states' and the weight's gradients on a small case, the worse one, beside dense float64."""
    small = Inputs.random(96, 64, 512, 8, dtype, device)
    exact = replace(
        small,
        hidden_NH=small.hidden_NH.detach().double().requires_grad_(),
        weight_VH=small.weight_VH.detach().double().requires_grad_(),
    )
    loss(small).backward()
    LOSSES[objective](DenseVocab(exact.hidden_NH @ exact.weight_VH.t(), exact.vocab_size), exact).backward()
    errors = []
    for tensor, reference in ((small.hidden_NH, exact.hidden_NH), (small.weight_VH, exact.weight_VH)):
        assert tensor.grad is not None
        assert reference.grad is not None
        errors.append((tensor.grad - reference.grad).abs().max() / reference.grad.abs().max())
    return float(torch.stack(errors).max())


def _compiled(objective: str) -> Loss:
    """The vocabulary's part alone is compiled: the gate's sums over blocks break the graph."""

    @torch.compile
    def logprob(hidden_NH: Tensor, weight_VH: Tensor, sampled_N: Tensor) -> Tensor:
        logits_NV = (hidden_NH @ weight_VH.t()).float()
        return logits_NV.gather(1, sampled_N[:, None])[:, 0] - logits_NV.logsumexp(1)

    @torch.compile
    def logprob_and_logits(
        hidden_NH: Tensor, weight_VH: Tensor, sampled_N: Tensor, support_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits_NV = (hidden_NH @ weight_VH.t()).float()
        drift = logits_NV.detach()
        return drift.gather(1, sampled_N[:, None])[:, 0] - drift.logsumexp(1), logits_NV.gather(1, support_NK)

    def sampled(inputs: Inputs) -> Tensor:
        logprobs_N = logprob(inputs.hidden_NH, inputs.weight_VH, inputs.sampled_N)
        return -(inputs.gate(logprobs_N) * logprobs_N).sum()

    def lsm(inputs: Inputs) -> Tensor:
        logprobs_N, logits_NK = logprob_and_logits(
            inputs.hidden_NH, inputs.weight_VH, inputs.sampled_N, inputs.support_NK
        )
        log_pi_NK, log_q_NK = logits_NK.log_softmax(1), inputs.teacher_logprobs_NK
        return (inputs.gate(logprobs_N) * reverse_kl(log_pi_NK, log_q_NK, lambda terms: terms.sum(-1))).sum()

    return {"sampled": sampled, "lsm": lsm}[objective]


def _megatron(objective: str) -> Loss:
    if objective != "sampled":
        raise LookupError("a cross entropy with one target per token")
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        logits_NV = inputs.hidden_NH @ inputs.weight_VH.t()
        # It wants [S, B, V]. Of float32 logits it overwrites the storage, which nobody reads again here.
        nll_N = vocab_parallel_cross_entropy(logits_NV[:, None], inputs.sampled_N[:, None])[:, 0]
        return (inputs.gate(-nll_N) * nll_N).sum()

    return loss


def _liger(objective: str) -> Loss:
    try:
        importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        raise LookupError("liger-kernel is not installed") from None
    if not torch.cuda.is_available():
        raise LookupError("needs a GPU")
    if objective != "sampled":
        raise LookupError(NOT_A_GATED_LOSS)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def loss(inputs: Inputs) -> Tensor:
        nll_N = fused(inputs.weight_VH, inputs.hidden_NH, inputs.sampled_N)
        return (inputs.gate(-nll_N) * nll_N).sum()

    return loss


@torch.no_grad()
def products(inputs: Inputs, count: int) -> None:
    """The bare matrix products of a head, into buffers that `count` = 3 makes one after the other: logits, the hidden
    states' gradient, the weight's gradient. In chunks of columns, since the whole would not fit everywhere."""
    hidden_NH, width = inputs.hidden_NH, 8192
    total_NH = torch.zeros_like(hidden_NH)
    for weight_vH in inputs.weight_VH.split(width):
        logits_Nv = hidden_NH @ weight_vH.t()
        if count == 3:
            total_NH.addmm_(logits_Nv, weight_vH)
            torch.mm(logits_Nv.t(), hidden_NH)
