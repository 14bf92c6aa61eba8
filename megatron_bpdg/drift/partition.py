"""Partitions: which block each response token belongs to.

A partition sees one whole response, before any sharding, so its blocks do not depend on how the batch is later spread
over sequence shards, micro-batches or ranks. Positions count from the first response token, holes in the loss mask
included: a masked token keeps its place but is left out of the block's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Partition(Protocol):
    """Maps the tokens of one response to block numbers 0, 1, 2, ... in order."""

    def __call__(self, response_R: Tensor) -> Tensor:
        """response_R: token ids ``[R]`` (int64). Returns non-decreasing block numbers ``[R]`` (int64) from 0."""


@dataclass(frozen=True)
class FixedBlocks:
    """Blocks of `size` consecutive tokens; the last block may be shorter (Block64 of arXiv 2606.24084 has size 64).

    Of size 1: the token-level gate.
    """

    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"FixedBlocks.size must be at least 1, got {self.size}")

    def __call__(self, response_R: Tensor) -> Tensor:
        return torch.arange(len(response_R), device=response_R.device) // self.size


@dataclass(frozen=True)
class NewlineSpans:
    """Spans that end with a newline token (NewlineSpan of arXiv 2606.24084).

    A span shorter than `min_size` is merged with the one after it, a short last span with the one before it where the
    two fit into `max_size`. A span longer than `max_size` is cut into the fewest chunks that fit, of equal length to
    within one token; a response without newlines thus becomes equal chunks. The paper does not publish its limits.
    """

    newline_ids: Collection[int]
    min_size: int = 8
    max_size: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"NewlineSpans needs 1 <= min_size <= max_size, got {self.min_size}, {self.max_size}")
        if not self.newline_ids:
            raise ValueError("NewlineSpans.newline_ids is empty: the tokenizer has no token that contains a newline")

    def __call__(self, response_R: Tensor) -> Tensor:
        is_newline = torch.isin(response_R, torch.tensor(sorted(self.newline_ids), device=response_R.device))
        sizes = _span_sizes(is_newline.tolist(), self.min_size, self.max_size)
        size_G = torch.tensor(sizes, dtype=torch.int64, device=response_R.device)
        return torch.repeat_interleave(torch.arange(len(sizes), device=response_R.device), size_G)


@dataclass(frozen=True)
class WholeSequence:
    """One block: the sequence-level gate."""

    def __call__(self, response_R: Tensor) -> Tensor:
        return torch.zeros(len(response_R), dtype=torch.int64, device=response_R.device)


def _span_sizes(is_newline: list[bool], min_size: int, max_size: int) -> list[int]:
    spans: list[int] = []
    length = 0
    for newline in is_newline:
        length += 1
        if newline and length >= min_size:
            spans.append(length)
            length = 0
    if length and length < min_size and spans and spans[-1] + length <= max_size:
        spans[-1] += length
    elif length:
        spans.append(length)
    sizes: list[int] = []
    for span in spans:
        chunks = -(-span // max_size)
        size, longer = divmod(span, chunks)
        sizes += [size + 1] * longer + [size] * (chunks - longer)
    return sizes


def newline_token_ids(decode: Callable[[list[int]], str], vocab_size: int) -> frozenset[int]:
    """Ids whose decoded text contains a newline (Qwen3 has several: a newline with spaces, doubled newlines, ...)."""
    return frozenset(token for token in range(vocab_size) if "\n" in decode([token]))
