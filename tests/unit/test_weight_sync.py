"""Packing weights into buckets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.serving.weights.base import buckets


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_buckets_lose_nothing_keep_the_order_and_the_bound(sizes: list[int], limit: int) -> None:
    weights = [(f"w{i}", torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    made = list(buckets(iter(weights), 4 * limit))
    assert [last for _, last in made] == [False] * (len(made) - 1) + [True]
    sent = [pair for bucket, _ in made for pair in bucket]
    assert [name for name, _ in sent] == [name for name, _ in weights]
    for (_, tensor), (_, expected) in zip(sent, weights):
        assert torch.equal(tensor, expected)
    for bucket, _ in made:
        assert len(bucket) == 1 or sum(len(tensor) for _, tensor in bucket) <= limit


def test_buckets_own_their_memory() -> None:
    whole = torch.arange(12.0).view(3, 4)
    ((bucket, _),) = buckets([("column", whole[:, 1])], 10**6)
    (_, tensor) = bucket[0]
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == 12
    whole.zero_()
    assert tensor.tolist() == [1.0, 5.0, 9.0]
