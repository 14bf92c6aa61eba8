"""`VocabOps` straight from hidden states and the head's weight: the logits of all positions never exist.

The vocabulary is swept in chunks of columns, ``[N, v]`` at a time. One forward sweep gives the log-sum-exp and the
entropy (and the top-K, if that is asked for first); it stores ``[N]``, and the chunks that it has room to keep for a
backward. A backward sweep makes the others again. The chunks are of columns, not of tokens, since then one product over
all tokens finishes each row of the weight's gradient: nothing of the weight's size is read and written once per chunk,
and nothing is rounded more than once.

Logits of given ids are products of gathered pairs of rows, forward and backward, without a sweep (`sparse.py`): a loss
on K ids per token costs one forward sweep (for the drift), and no backward one.

Logits have the dtype that a matrix product of the hidden states has, as if they were materialised; everything after
them is float32 (float64 for float64). Collectives are those of `ParallelVocab`, except that the log-sum-exp and the
entropy share two all-reduces (``[N]`` and ``[2, N]``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.objectives.vocabulary import check_ids, check_topk, ordered_topk
from megatron_bpdg.parallel.sparse import RowPairs
from megatron_bpdg.parallel.vocab import PerToken, TokenLayout, best_candidates, merge_topk, scatter_add_
from megatron_bpdg.parallel.weight_gradient import WeightGradient, addmm_


@dataclass(frozen=True)
class Swept:
    """What one sweep over the vocabulary leaves, for all N rows and replicated; the top-K is this shard's.

    Attributes:
        lse_N, entropy_N: of the whole vocabulary.
        k, top: this shard's k largest logits, or all that it has, and their ids, ``[N, k]`` each; None if k is 0.
    """

    lse_N: Tensor
    entropy_N: Tensor
    k: int
    top: tuple[Tensor, Tensor] | None


@dataclass(eq=False)
class ChunkedVocab:
    """`VocabOps` without logits; see the module docstring.

    Attributes:
        hidden_NH: normed hidden states of N positions, any float dtype, the same on every rank of the group. Their
            gradient is this rank's part of a sum over the group (see `head.response_states`).
        weight_VH: this rank's rows of the head, ``[V_padded / TP, H]``.
        vocab_size: true vocabulary; rows beyond it are padding and never enter a softmax.
        layout, temperature: see `ParallelVocab`.
        chunk_mb: bound on one chunk of float32 logits, and on one chunk of gathered rows, in units of 1e6 bytes; up to
            three such buffers exist at a time. A chunk is at least one column, or one row.
        keep_mb: bound on the undivided logits that the forward keeps for a backward, which then need not be made again,
            in units of 1e6 bytes.
        accumulate: add the weight's gradient to ``weight_VH.main_grad`` (see `WeightGradient`).

    Raises:
        ValueError: where the shard cannot hold its part of the vocabulary, N does not divide when scattered, or a whole
            distribution is asked for.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    vocab_size: int
    layout: TokenLayout
    temperature: float = 1.0
    _: KW_ONLY
    chunk_mb: float = 128.0
    keep_mb: float = 0.0
    accumulate: bool = False

    def __post_init__(self) -> None:
        self.layout.check(len(self.hidden_NH))
        self.chunk_bytes = self.chunk_mb * 1e6
        self.dtype = torch.promote_types(self.hidden_NH.dtype, torch.float32)
        self.shards = self.layout.shards(len(self.weight_VH), self.vocab_size)
        self.ids = self.shards[self.layout.rank]
        self._swept: Swept | None = None
        self._kept: dict[int, Tensor] = {}

    def rows(self, per_token: Tensor) -> Tensor:
        return self.layout.rows(per_token)

    def logsumexp(self) -> Tensor:
        lse_N = self._sweep_of_term().lse_N
        return self._bind(self.rows(lse_N), Term(lse_N))

    def logprob(self, ids_N: Tensor) -> Tensor:
        check_ids(ids_N, self.vocab_size)
        lse_N = self._sweep_of_term().lse_N
        with torch.no_grad():
            logits_N1 = self.pairs(ids_N[:, None]).dot(self.hidden_NH, self.weight_VH)
            value_n = self.layout.reduce(logits_N1)[:, 0] - self.rows(lse_N)
        return self._bind(value_n, Term(lse_N, column_N=ids_N - self.ids.start))

    def entropy(self) -> Tensor:
        swept = self._sweep_of_term()
        return self._bind(self.rows(swept.entropy_N), Term(swept.lse_N, entropy_N=swept.entropy_N))

    def gather(self, ids_NK: Tensor) -> Tensor:
        check_ids(ids_NK, self.vocab_size)
        pairs = self.pairs(ids_NK)
        with torch.no_grad():
            value_nK = self.layout.reduce(pairs.dot(self.hidden_NH, self.weight_VH))
        gradients = partial(pairs.gradients, self.accumulate)
        return PerToken.apply(value_nK, self.layout, gradients, self.hidden_NH, self.weight_VH)

    @torch.no_grad()
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """See `VocabOps`. Asked for before anything else, it shares the sweep of everything else."""
        check_topk(k, self.vocab_size)
        top = self.sweep(k).top
        assert top is not None
        values_NK, ids_NK = merge_topk(*top, k, self.shards, self.layout)
        return self.rows(values_NK), self.rows(ids_NK)

    def log_softmax(self) -> Tensor:
        raise ValueError(_NOT_WHOLE)

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        raise ValueError(_NOT_WHOLE)

    def _sweep_of_term(self) -> Swept:
        """For a result that a backward may go through."""
        return self.sweep(
            keep=torch.is_grad_enabled() and (self.hidden_NH.requires_grad or self.weight_VH.requires_grad)
        )

    @torch.no_grad()
    def sweep(self, k: int = 0, *, keep: bool = False) -> Swept:
        """The forward sweep, which is made once; once more only if a top-K is asked for that it did not look for.

        With `keep` it keeps chunks for a backward.
        """
        if self._swept is None or (k and self._swept.k != k):
            parts_3CN, top = self.sweep_shard(k, keep)
            self._swept = Swept(*self._combined(*parts_3CN), k, top)
        return self._swept

    def sweep_shard(self, k: int, keep: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Softmax statistics of this shard in C parts, ``[3, C, N]``, and its k largest logits.

        The three are max z, sum e^(z - max) and sum (z - max) e^(z - max), each with the maximum of its part.
        """
        empty_N0 = self.hidden_NH.new_empty(len(self.hidden_NH), 0, dtype=self.dtype)
        top = (empty_N0, empty_N0.long()) if k else None
        parts, room = [], self.keep_mb * 1e6 if keep else 0.0
        for start, stop in self.chunks():
            product_Nv = self.product(start, stop)
            room -= product_Nv.nbytes
            if room >= 0.0:
                self._kept[start] = product_Nv
            logits_Nv = self._divided(product_Nv, copy=room >= 0.0)
            if top is not None:
                found = ordered_topk(logits_Nv, k, self.ids.start + start)
                top = best_candidates(torch.cat([top[0], found[0]], 1), torch.cat([top[1], found[1]], 1), k)
            max_N = logits_Nv.amax(1)
            shifted_Nv = logits_Nv.sub_(max_N[:, None])
            exp_Nv = shifted_Nv.exp()
            parts.append(torch.stack([max_N, exp_Nv.sum(1), exp_Nv.mul_(shifted_Nv).sum(1)]))
        if not parts:
            return empty_N0.t().expand(3, 0, -1), top
        return torch.stack(parts, dim=1), top

    def _combined(self, max_CN: Tensor, sum_CN: Tensor, shifted_CN: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and entropy of the whole vocabulary from the parts of every shard."""
        max_N = max_CN.amax(0) if len(max_CN) else max_CN.new_full((len(self.hidden_NH),), -torch.inf)
        dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=self.layout.group)
        # Each part's sums refer to the part's own maximum, so that no exponential overflows. They are rebased to the
        # maximum of all parts, which is d higher: e^(z - max) = e^-d e^(z - own), and z - max = (z - own) - d.
        lower_CN = max_CN - max_N
        scale_CN = lower_CN.exp()
        sums_2N = torch.stack([(scale_CN * sum_CN).sum(0), (scale_CN * (shifted_CN + lower_CN * sum_CN)).sum(0)])
        sum_N, shifted_N = self.layout.sum_(sums_2N)
        return max_N + sum_N.log(), sum_N.log() - shifted_N / sum_N

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks of valid columns."""
        width = max(int(self.chunk_bytes / (4 * max(len(self.hidden_NH), 1))), 1)
        if width > _ALIGNED:
            width -= width % _ALIGNED
        for start in range(0, len(self.ids), width):
            yield start, min(start + width, len(self.ids))

    def product(self, start: int, stop: int) -> Tensor:
        """A fresh ``[N, stop - start]`` of undivided logits."""
        return self.hidden_NH @ self.weight_VH[start:stop].t()

    def _divided(self, product_Nv: Tensor, *, copy: bool = False) -> Tensor:
        """Logits in float32 or float64; without `copy` they may overwrite the product."""
        logits_Nv = product_Nv.to(self.dtype, copy=copy)
        return logits_Nv if self.temperature == 1.0 else logits_Nv.div_(self.temperature)

    def kept_or_again(self, start: int, stop: int) -> Tensor:
        """A chunk's product, for a backward that overwrites it."""
        kept_Nv = self._kept.pop(start, None)
        return self.product(start, stop) if kept_Nv is None else kept_Nv

    def chunk_gradient(self, start: int, stop: int, term: Term, grad_N: Tensor) -> Tensor:
        """Of a chunk's undivided logits, in the hidden states' dtype, from that of the term, all rows."""
        logits_Nv = self._divided(self.kept_or_again(start, stop))
        return self.logits_gradient(logits_Nv, start, term, grad_N).to(self.hidden_NH.dtype)

    def logits_gradient(self, logits_Nv: Tensor, start: int, term: Term, grad_N: Tensor) -> Tensor:
        """The same in float32; overwrites `logits_Nv`."""
        grad_N = grad_N.to(self.dtype) / self.temperature
        log_p_Nv = logits_Nv.sub_(term.lse_N[:, None])
        if term.entropy_N is not None:
            p_Nv = log_p_Nv.exp()
            return log_p_Nv.add_(term.entropy_N[:, None]).mul_(p_Nv).mul_(-grad_N[:, None])
        if term.column_N is None:
            return log_p_Nv.exp_().mul_(grad_N[:, None])
        grad_Nv = log_p_Nv.exp_().mul_(-grad_N[:, None])
        return scatter_add_(grad_Nv, (term.column_N - start)[:, None], grad_N[:, None])

    def pairs(self, ids_NK: Tensor) -> RowPairs:
        """K ids for each token, for products with their rows."""
        return RowPairs(ids_NK - self.ids.start, len(self.ids), self.temperature, self.chunk_bytes)

    def _bind(self, value_n: Tensor, term: Term) -> Tensor:
        return PerToken.apply(value_n, self.layout, partial(self._sweep_back, term), self.hidden_NH, self.weight_VH)

    def _sweep_back(
        self, term: Term, grad_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The backward sweep: the gradients of hidden states and weight from that of a term."""
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=self.dtype) if hidden_NH.requires_grad else None
        weight_grad = WeightGradient(weight_VH, self.accumulate, weight_VH.dtype) if weight_VH.requires_grad else None
        for start, stop in self.chunks():
            grad_Nv = self.chunk_gradient(start, stop, term, grad_N)
            if hidden_grad_NH is not None:
                addmm_(hidden_grad_NH, grad_Nv, weight_VH[start:stop])
            if weight_grad is not None:
                weight_grad.add_product(start, stop, grad_Nv.t(), hidden_NH)
        return (
            hidden_grad_NH.to(hidden_NH.dtype) if hidden_grad_NH is not None else None,
            weight_grad.result() if weight_grad is not None else None,
        )


_ALIGNED = 128
_NOT_WHOLE = (
    "a head that never makes the logits has no distribution over the whole vocabulary: set training.head to "
    "materialised or auto"
)


@dataclass(frozen=True)
class Term:
    """A per-token result whose gradient covers the whole vocabulary; all of it for all N rows.

    - log-sum-exp: ``d/dz_v = p_v``
    - log-prob, with the ids' `column_N` in this shard (outside of it: any other number): ``[v = y] - p_v``
    - entropy, with its `entropy_N`: ``-p_v (log p_v + H)``
    """

    lse_N: Tensor
    column_N: Tensor | None = None
    entropy_N: Tensor | None = None
