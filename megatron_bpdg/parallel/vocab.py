"""`VocabOps` over a vocabulary split across tensor-parallel ranks, with hand-written exact gradients.

Two kinds of tensors, and one rule each for their gradients:

- vocabulary-sharded, ``[N, V_local]``: every rank holds, and differentiates, its own columns;
- per-token results: either *replicated* (every rank holds all N rows and an equal gradient), or *scattered* (rank r
  holds rows ``r N/TP ... (r+1) N/TP`` and the only gradient of those rows, as sequence parallelism wants it).

Results are made by summing per-rank partial sums (`TokenLayout.reduce`), and a result's gradient reaches all columns
after `TokenLayout.expand`. No collective is ever differentiated through by autograd. Collectives per operation, beyond
the two all-reduces of ``[N]`` that the log-sum-exp costs once per `ParallelVocab`: one reduce in the forward of
`logprob`, `gather`, `entropy` and `vocab_sum`; in the backward none when replicated and one all-gather when scattered;
`log_softmax` has none in the forward and one all-reduce of ``[N]`` in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import check_ids, check_topk, ordered_topk

# torch 2.13 renamed both; older versions only have the second name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class TokenLayout:
    """How per-token results lie on the ranks of a tensor-parallel group.

    Attributes:
        group: the tensor-parallel group.
        scattered: keep only this rank's slice of the rows (N must then be a multiple of the group's size).
    """

    group: dist.ProcessGroup
    scattered: bool = False

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def check(self, num_tokens: int) -> None:
        if self.scattered and num_tokens % self.size:
            raise ValueError(
                f"{num_tokens} tokens cannot be scattered over {self.size} ranks: pad to a multiple of {self.size}"
            )

    def shards(self, width: int, vocab_size: int) -> list[range]:
        """The ids of every rank's `width` columns; columns beyond them are padding."""
        if width * self.size < vocab_size:
            raise ValueError(f"{self.size} shards of {width} columns cannot hold a vocabulary of {vocab_size}")
        starts = [min(width * rank, vocab_size) for rank in range(self.size)]
        return [range(start, min(start + width, vocab_size)) for start in starts]

    def rows(self, per_token: Tensor) -> Tensor:
        """This rank's rows of a replicated ``[N, ...]``."""
        if not self.scattered:
            return per_token
        return per_token.chunk(self.size)[self.rank] if len(per_token) else per_token

    def sum_(self, partial: Tensor) -> Tensor:
        """All-reduced sum, in place, all rows on every rank."""
        dist.all_reduce(partial, group=self.group)
        return partial

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum ``[N, ...]`` of partial sums, this rank's rows."""
        if not self.scattered:
            return self.sum_(partial.contiguous())
        out = partial.new_empty(len(partial) // self.size, *partial.shape[1:])
        _reduce_scatter(out, partial.contiguous(), group=self.group)
        return out

    def expand(self, rows: Tensor) -> Tensor:
        """All N rows from each rank's own rows: the transpose of `rows`, used on gradients."""
        if not self.scattered:
            return rows
        out = rows.new_empty(len(rows) * self.size, *rows.shape[1:])
        _all_gather(out, rows.contiguous(), group=self.group)
        return out


class ParallelVocab:
    """`VocabOps` on this rank's columns of the logits; see the module docstring for layouts and collectives.

    Args:
        logits_NV: this rank's shard ``[N, V_padded / TP]``, any float dtype. Never modified.
        vocab_size: true vocabulary; columns beyond it are padding and never enter a softmax.
        layout: the tensor-parallel group, and whether tokens are scattered over it.
        temperature: divides the logits.

    Raises:
        ValueError: where the shard cannot hold its part of the vocabulary, or N does not divide when scattered.
    """

    def __init__(self, logits_NV: Tensor, vocab_size: int, layout: TokenLayout, temperature: float = 1.0) -> None:
        layout.check(len(logits_NV))
        self.vocab_size = vocab_size
        self.layout = layout
        self.shards = layout.shards(logits_NV.shape[1], vocab_size)
        self.ids = self.shards[layout.rank]
        logits_NV = logits_NV[:, : len(self.ids)].to(torch.promote_types(logits_NV.dtype, torch.float32))
        self.logits_NV = logits_NV if temperature == 1.0 else logits_NV / temperature

    @cached_property
    def _lse_N(self) -> Tensor:
        with torch.no_grad():
            logits_NV = self.logits_NV
            max_N = logits_NV.new_full((len(logits_NV),), -torch.inf)
            if logits_NV.shape[1]:
                max_N = logits_NV.amax(1)
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=self.layout.group)
            # A row of -inf alone has no maximum to subtract; its log-sum-exp is -inf.
            shift_N = torch.where(max_N == -torch.inf, 0.0, max_N)
            return shift_N + self.layout.sum_((logits_NV - shift_N[:, None]).exp().sum(1)).log()

    def rows(self, per_token: Tensor) -> Tensor:
        return self.layout.rows(per_token)

    def logsumexp(self) -> Tensor:
        return self._bind(self.rows(self._lse_N), _logsumexp_gradient)

    def logprob(self, ids_N: Tensor) -> Tensor:
        check_ids(ids_N, self.vocab_size)
        column_N1 = (ids_N - self.ids.start)[:, None]
        with torch.no_grad():
            value_n = self.layout.reduce(_pick(self.logits_NV, column_N1))[:, 0] - self.rows(self._lse_N)
        return self._bind(value_n, _logprob_gradient, column_N1)

    def gather(self, ids_NK: Tensor) -> Tensor:
        check_ids(ids_NK, self.vocab_size)
        return _Gather.apply(self.logits_NV, ids_NK - self.ids.start, self.layout)

    @torch.no_grad()
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        check_topk(k, self.vocab_size)
        mine = ordered_topk(self.logits_NV, k, self.ids.start)
        values_NK, ids_NK = merge_topk(*mine, k, self.shards, self.layout)
        return self.rows(values_NK), self.rows(ids_NK)

    def entropy(self) -> Tensor:
        with torch.no_grad():
            entropy_N = self.layout.sum_(torch.special.entr(_softmax(self.logits_NV, self._lse_N)).sum(1))
        return self._bind(self.rows(entropy_N), _entropy_gradient, entropy_N)

    def log_softmax(self) -> Tensor:
        return _LogSoftmax.apply(self.logits_NV, self._lse_N, self.layout)

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        return _VocabSum.apply(x_NV, self.layout)

    def _bind(self, value_n: Tensor, gradient: Callable[..., tuple[Tensor]], *saved: Tensor) -> Tensor:
        return PerToken.apply(value_n, self.layout, gradient, self.logits_NV, self._lse_N, *saved)


def merge_topk(
    values_NC: Tensor, ids_NC: Tensor, k: int, shards: list[range], layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """The k best of every shard's k best (or of all that it has), all rows on every rank."""
    # All ranks send k candidates, as collectives want it; what a shard narrower than that fills up with is cut off.
    gathered = []
    for candidates in (values_NC, ids_NC):
        mine = F.pad(candidates, (0, k - candidates.shape[1]))
        everyones = [torch.empty_like(mine) for _ in shards]
        dist.all_gather(everyones, mine, group=layout.group)
        gathered.append(torch.cat([part[:, : len(ids)] for part, ids in zip(everyones, shards)], dim=1))
    return best_candidates(gathered[0], gathered[1], k)


def best_candidates(values_NC: Tensor, ids_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of C candidates that stand in ascending order of their ids wherever values are equal."""
    values_NK, place_NK = ordered_topk(values_NC, k)
    return values_NK, ids_NC.gather(1, place_NK)


class PerToken(torch.autograd.Function):
    """Gives a result per token, made without autograd, the gradients of what it was made of.

    ``gradients(grad_N, *inputs)`` is handed the result's gradient for all N rows and returns those of the first inputs;
    the inputs after these are constants.
    """

    @staticmethod
    def forward(
        ctx: Any, value_n: Tensor, layout: TokenLayout, gradients: Callable[..., tuple[Any, ...]], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.layout, ctx.gradients = layout, gradients
        return value_n.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        given = ctx.gradients(ctx.layout.expand(grads[0]), *inputs)
        return None, None, None, *given, *[None] * (len(inputs) - len(given))


def _softmax(logits_NV: Tensor, lse_N: Tensor) -> Tensor:
    return (logits_NV - lse_N[:, None]).exp()


def _logsumexp_gradient(grad_N: Tensor, logits_NV: Tensor, lse_N: Tensor) -> tuple[Tensor]:
    """d lse / dz_v = p_v."""
    return (_softmax(logits_NV, lse_N).mul_(grad_N[:, None]),)


def _logprob_gradient(grad_N: Tensor, logits_NV: Tensor, lse_N: Tensor, column_N1: Tensor) -> tuple[Tensor]:
    """d log p_y / dz_v = [v = y] - p_v, on every rank, whether or not it holds y."""
    grad_NV = _softmax(logits_NV, lse_N).mul_(-grad_N[:, None])
    return (scatter_add_(grad_NV, column_N1, grad_N[:, None]),)


def _entropy_gradient(grad_N: Tensor, logits_NV: Tensor, lse_N: Tensor, entropy_N: Tensor) -> tuple[Tensor]:
    """H = lse - sum_v p_v z_v;  dH/dz_v = -p_v (log p_v + H)."""
    p_NV = _softmax(logits_NV, lse_N)
    # -p log p is entr(p), which is 0 at p = 0 where p * log p would be NaN.
    return ((torch.special.entr(p_NV) - p_NV * entropy_N[:, None]).mul_(grad_N[:, None]),)


class _Gather(torch.autograd.Function):
    """Logits of given ids; repeated ids add up in the backward, which does not need the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, column_NK: Tensor, layout: TokenLayout) -> Tensor:
        ctx.save_for_backward(column_NK)
        ctx.shape, ctx.layout = logits_NV.shape, layout
        return layout.reduce(_pick(logits_NV, column_NK))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (column_NK,) = ctx.saved_tensors
        grad_NK = ctx.layout.expand(grads[0])
        return scatter_add_(grad_NK.new_zeros(ctx.shape), column_NK, grad_NK), None, None


class _LogSoftmax(torch.autograd.Function):
    """dL/dz_v = g_v - p_v sum_u g_u, where the sum runs over every rank's columns."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, lse_N: Tensor, layout: TokenLayout) -> Tensor:
        log_p_NV = logits_NV - lse_N[:, None]
        ctx.save_for_backward(log_p_NV)
        ctx.layout = layout
        return log_p_NV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (log_p_NV,) = ctx.saved_tensors
        total_N = ctx.layout.sum_(grads[0].sum(1))
        return grads[0] - log_p_NV.exp() * total_N[:, None], None, None


class _VocabSum(torch.autograd.Function):
    """Sum over all ranks' columns; every column gets the result's gradient."""

    @staticmethod
    def forward(ctx: Any, x_NV: Tensor, layout: TokenLayout) -> Tensor:
        ctx.shape, ctx.layout = x_NV.shape, layout
        return layout.reduce(x_NV.sum(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.expand(grads[0])[:, None].expand(ctx.shape), None


def _pick(logits_NV: Tensor, column_NK: Tensor) -> Tensor:
    """Logits of columns, 0 for those of other shards."""
    if logits_NV.shape[1] == 0:
        return logits_NV.new_zeros(column_NK.shape)
    here_NK = _is_here(column_NK, logits_NV)
    return torch.where(here_NK, logits_NV.gather(1, torch.where(here_NK, column_NK, 0)), 0.0)


def scatter_add_(grad_NV: Tensor, column_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Add to columns in place; those of other shards or chunks add nothing."""
    if grad_NV.shape[1] == 0:
        return grad_NV
    here_NK = _is_here(column_NK, grad_NV)
    # Absent columns point at column 0 with value 0: adding keeps that column's own gradient.
    return grad_NV.scatter_add_(1, torch.where(here_NK, column_NK, 0), torch.where(here_NK, values_NK, 0.0))


def _is_here(column_NK: Tensor, x_NV: Tensor) -> Tensor:
    return (column_NK >= 0) & (column_NK < x_NV.shape[1])
