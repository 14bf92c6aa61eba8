"""The tests' own ranks: each call gets processes that nothing has run in, and a rank that fails says why."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from tests.parallel.spawn import run_ranks

_seen: list[int] = []


def remember(value: int) -> tuple[list[int], int]:
    _seen.append(value)
    return _seen, os.getpid()


def fail_on_the_second() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second rank's own words")
    dist.barrier()


def test_nothing_is_left_of_an_earlier_call_and_a_failure_is_told() -> None:
    first = run_ranks(remember, 2, 1)
    with pytest.raises(AssertionError, match=r"(?s)fail_on_the_second.*ValueError: the second rank's own words"):
        run_ranks(fail_on_the_second, 2)
    second = run_ranks(remember, 2, 2)
    assert [seen for seen, _ in first + second] == [[1], [1], [2], [2]]
    assert len({pid for _, pid in first + second}) == 4
