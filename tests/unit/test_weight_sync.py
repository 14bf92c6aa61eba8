"""Packing weights into buckets, and how transports find engines and trainers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.config.rollout import WeightSync
from megatron_bpdg.serving.sglang.weights import tensor as by_memory
from megatron_bpdg.serving.sglang.weights.base import buckets
from megatron_bpdg.serving.sglang.weights.distributed import _address


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


def test_each_rank_of_each_engine_gets_a_handle_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_memory.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(by_memory.dist, "get_world_size", lambda: 1)
    sent: dict[str, int] = {}

    class Calls:
        def post(self, path: str, body: Any) -> None:
            sent.update({url: len(body(url)["serialized_named_tensors"]) for url in ("one", "two")})

    sync = by_memory.TensorSync(WeightSync(), Path())
    sync._send([("w", torch.ones(3))], "v", Calls(), {"one": range(2), "two": range(2, 5)})  # type: ignore[arg-type]
    assert sent == {"one": 2, "two": 3}


def test_engines_are_told_the_address_that_they_can_reach() -> None:
    assert _address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    ours = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    if not ours:
        pytest.skip("this machine has no address but its own loopback")
    assert _address(["http://127.0.0.1:1", f"http://{ours[0]}:2"]) == ours[0]
