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

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
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
        self.first_id, num_valid = shard_columns(logits_NV.shape[1], vocab_size, layout)
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        logits_NV = logits_NV[:, :num_valid].to(dtype)
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

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        check_ids(ids, self.vocab_size)
        columns = ids - self.first_id
        here = (columns >= 0) & (columns < self.logits_NV.shape[1])
        return torch.where(here, columns, 0), here

    def rows(self, per_token: Tensor) -> Tensor:
        return self.layout.rows(per_token)

    def logsumexp(self) -> Tensor:
        return _LogSumExp.apply(self.logits_NV, self._lse_N, self.layout)

    def logprob(self, ids_N: Tensor) -> Tensor:
        return _LogProb.apply(self.logits_NV, self._lse_N, *self._local(ids_N), self.layout)

    def gather(self, ids_NK: Tensor) -> Tensor:
        return _Gather.apply(self.logits_NV, *self._local(ids_NK), self.layout)

    @torch.no_grad()
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        check_topk(k, self.vocab_size)
        mine = min(k, self.logits_NV.shape[1])
        values_NK, ids_NK = topk_filler(self.logits_NV.new_empty(len(self.logits_NV), k))
        values_NK[:, :mine], ids_NK[:, :mine] = ordered_topk(self.logits_NV, mine, self.first_id)
        values_NK, ids_NK = merge_topk(values_NK, ids_NK, self.layout)
        return self.rows(values_NK), self.rows(ids_NK)

    def entropy(self) -> Tensor:
        return _Entropy.apply(self.logits_NV, self._lse_N, self.layout)

    def log_softmax(self) -> Tensor:
        return _LogSoftmax.apply(self.logits_NV, self._lse_N, self.layout)

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        return _VocabSum.apply(x_NV, self.layout)


def shard_columns(width: int, vocab_size: int, layout: TokenLayout) -> tuple[int, int]:
    """The first id of this rank's shard, and how many of its columns are ids; the rest is padding."""
    if width * layout.size < vocab_size:
        raise ValueError(f"{layout.size} shards of {width} columns cannot hold a vocabulary of {vocab_size}")
    first_id = width * layout.rank
    return first_id, min(max(vocab_size - first_id, 0), width)


def topk_filler(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Impossible candidates ``[N, K]``: every rank offers K, and a shard narrower than that fills up with them."""
    return torch.full_like(values_NK, -torch.inf), torch.full_like(values_NK, -1, dtype=torch.int64)


def merge_topk(values_NK: Tensor, ids_NK: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The K best of every shard's K best, all rows on every rank."""
    candidates = [torch.empty_like(values_NK) for _ in range(layout.size)]
    dist.all_gather(candidates, values_NK, group=layout.group)
    candidate_ids = [torch.empty_like(ids_NK) for _ in range(layout.size)]
    dist.all_gather(candidate_ids, ids_NK, group=layout.group)
    return best_candidates(torch.cat(candidates, dim=1), torch.cat(candidate_ids, dim=1), values_NK.shape[1])


def best_candidates(values_NC: Tensor, ids_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of C candidates that stand in ascending order of their ids wherever values are equal."""
    # A stable sort keeps ties at the lower id; the fillers must sort behind real logits of -inf.
    filler = torch.sort(ids_NC < 0, dim=1, stable=True).indices
    values_NC, ids_NC = values_NC.gather(1, filler), ids_NC.gather(1, filler)
    order = torch.sort(values_NC.float(), dim=1, descending=True, stable=True).indices[:, :k]
    return values_NC.gather(1, order), ids_NC.gather(1, order)


def _softmax(logits_NV: Tensor, lse_N: Tensor) -> Tensor:
    return (logits_NV - lse_N[:, None]).exp()


class _LogSumExp(torch.autograd.Function):
    """d lse / dz_v = p_v."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, lse_N: Tensor, layout: TokenLayout) -> Tensor:
        ctx.save_for_backward(logits_NV, lse_N)
        ctx.layout = layout
        return layout.rows(lse_N).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, lse_N = ctx.saved_tensors
        grad_N = ctx.layout.expand(grads[0])
        return _softmax(logits_NV, lse_N).mul_(grad_N[:, None]), None, None


class _LogProb(torch.autograd.Function):
    """d log p_y / dz_v = [v = y] - p_v, on every rank, whether or not it holds y."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, lse_N: Tensor, column_N: Tensor, here_N: Tensor, layout: TokenLayout
    ) -> Tensor:
        ctx.save_for_backward(logits_NV, lse_N, column_N, here_N)
        ctx.layout = layout
        return layout.reduce(_pick(logits_NV, column_N[:, None], here_N[:, None]))[:, 0] - layout.rows(lse_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, lse_N, column_N, here_N = ctx.saved_tensors
        grad_N = ctx.layout.expand(grads[0])
        grad_NV = _softmax(logits_NV, lse_N).mul_(-grad_N[:, None])
        _scatter_add_(grad_NV, column_N[:, None], torch.where(here_N, grad_N, 0.0)[:, None])
        return grad_NV, None, None, None, None


class _Gather(torch.autograd.Function):
    """Logits of given ids; repeated ids add up in the backward."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, column_NK: Tensor, here_NK: Tensor, layout: TokenLayout) -> Tensor:
        ctx.save_for_backward(column_NK, here_NK)
        ctx.shape, ctx.layout = logits_NV.shape, layout
        return layout.reduce(_pick(logits_NV, column_NK, here_NK))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        column_NK, here_NK = ctx.saved_tensors
        grad_NK = ctx.layout.expand(grads[0])
        grad_NV = grad_NK.new_zeros(ctx.shape)
        _scatter_add_(grad_NV, column_NK, torch.where(here_NK, grad_NK, 0.0))
        return grad_NV, None, None, None


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


class _Entropy(torch.autograd.Function):
    """H = lse - sum_v p_v z_v;  dH/dz_v = -p_v (log p_v + H)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, lse_N: Tensor, layout: TokenLayout) -> Tensor:
        entropy_N = layout.sum_(torch.special.entr(_softmax(logits_NV, lse_N)).sum(1))
        ctx.save_for_backward(logits_NV, lse_N, entropy_N)
        ctx.layout = layout
        return layout.rows(entropy_N).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, lse_N, entropy_N = ctx.saved_tensors
        grad_N = ctx.layout.expand(grads[0])
        p_NV = _softmax(logits_NV, lse_N)
        # -p log p is entr(p), which is 0 at p = 0 where p * log p would be NaN.
        return (torch.special.entr(p_NV) - p_NV * entropy_N[:, None]).mul_(grad_N[:, None]), None, None


def _pick(logits_NV: Tensor, column_NK: Tensor, here_NK: Tensor) -> Tensor:
    if logits_NV.shape[1] == 0:
        return logits_NV.new_zeros(column_NK.shape)
    return torch.where(here_NK, logits_NV.gather(1, column_NK), 0.0)


def _scatter_add_(grad_NV: Tensor, column_NK: Tensor, values_NK: Tensor) -> None:
    # Ids of other shards point at column 0 with value 0: adding keeps that column's own gradient.
    if grad_NV.shape[1]:
        grad_NV.scatter_add_(1, column_NK, values_NK)
