"""Partitions: hand-computed examples, and what must hold for every response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.data.batch import collate
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.partition import FixedBlocks, NewlineSpans, Partition, WholeSequence, newline_token_ids

NEWLINE = 7


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def text(spans: str) -> Tensor:
    """A response written as characters: `|` is a newline token, anything else is not."""
    return ids(*(NEWLINE if character == "|" else 1 for character in spans))


def test_fixed_blocks_and_their_shorter_tail() -> None:
    assert FixedBlocks(3)(torch.zeros(8, dtype=torch.int64)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert FixedBlocks()(torch.zeros(130, dtype=torch.int64)).bincount().tolist() == [64, 64, 2]


def test_whole_sequence_and_tokens() -> None:
    assert WholeSequence()(ids(1, 2, 3)).tolist() == [0, 0, 0]
    assert FixedBlocks(1)(ids(1, 2, 3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("aa|bb|cc|", [0, 0, 0, 1, 1, 1, 2, 2, 2]),  # a newline ends its own span
        ("a|bb|", [0, 0, 0, 0, 0]),  # too short: merged with the next
        ("aa|||bb|", [0, 0, 0, 1, 1, 1, 1, 1]),  # empty lines are short spans
        ("aa|b", [0, 0, 0, 0]),  # a short last span joins the one before it
        ("aa|bbb", [0, 0, 0, 1, 1, 1]),  # a last span without a newline
        ("aaaaaaaa", [0, 0, 0, 0, 1, 1, 1, 1]),  # no newline: equal chunks
        ("aaaaaa|bbb", [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),  # too long: cut
        ("aaaa|b", [0, 0, 0, 0, 0, 1]),  # a short last span that does not fit stays by itself
        ("b", [0]),  # shorter than min_size, nothing to merge with
        ("", []),
    ],
)
def test_newline_spans(response: str, expected: list[int]) -> None:
    partition = NewlineSpans(frozenset({NEWLINE}), min_size=3, max_size=5)
    assert partition(text(response)).tolist() == expected


def test_any_of_several_newline_tokens_ends_a_span() -> None:
    partition = NewlineSpans({5, 6}, min_size=1, max_size=9)
    assert partition(ids(1, 5, 6, 2, 5, 3)).tolist() == [0, 0, 1, 2, 2, 2 + 1]


partitions = st.one_of(
    st.integers(1, 9).map(FixedBlocks),
    st.just(WholeSequence()),
    st.just(FixedBlocks(1)),
    st.tuples(st.integers(1, 6), st.integers(0, 6)).map(
        lambda sizes: NewlineSpans({NEWLINE}, min_size=sizes[0], max_size=sizes[0] + sizes[1])
    ),
)
responses = st.text("ab|", max_size=40).map(text)


@given(partitions, responses)
def test_blocks_are_consecutive_and_cover_the_response(partition: Partition, response: Tensor) -> None:
    blocks = partition(response)
    assert blocks.dtype == torch.int64
    assert blocks.shape == response.shape
    if len(blocks):
        assert int(blocks[0]) == 0
        assert set(blocks.diff().tolist()) <= {0, 1}


@given(st.integers(1, 6), st.integers(0, 6), responses)
def test_newline_span_sizes(min_size: int, slack: int, response: Tensor) -> None:
    """Nothing exceeds max_size; below min_size are only equal parts of a cut and a last span that fits nowhere."""
    max_size = min_size + slack
    blocks = NewlineSpans({NEWLINE}, min_size, max_size)(response)
    sizes = blocks.bincount().tolist() if len(blocks) else []
    assert all(size <= max_size for size in sizes)
    for block, size in enumerate(sizes):
        if size < min_size:
            assert block == len(sizes) - 1 or size >= (max_size + 1) // 2
    for block in range(len(sizes) - 1):  # a span ends at a newline or where it was cut
        end = sum(sizes[: block + 1])
        assert int(response[end - 1]) == NEWLINE or sizes[block] >= (max_size + 1) // 2


@given(st.integers(1, 9), responses)
def test_a_prefix_has_the_same_fixed_blocks(size: int, response: Tensor) -> None:
    """Positions count from the first response token, whatever follows."""
    half = len(response) // 2
    assert torch.equal(FixedBlocks(size)(response)[:half], FixedBlocks(size)(response[:half]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5))
def test_a_block_never_spans_two_sequences_of_a_batch(lengths: list[int], size: int) -> None:
    partition = FixedBlocks(size)
    batch = collate(
        [
            Trajectory(i, 0, [1], [2] * n, torch.zeros(n), True, block_R=partition(torch.zeros(n)))
            for i, n in enumerate(lengths)
        ],
        pad_id=0,
        length_multiple=1,
        token_multiple=4,
    )
    owners: dict[int, set[int]] = {}
    for block, sequence in zip(batch.block_N.tolist(), batch.sequence_N.tolist()):
        owners.setdefault(block, set()).add(sequence)
    assert all(len(sequences) == 1 for sequences in owners.values())
    assert len(owners) == batch.num_blocks == sum(-(-n // size) for n in lengths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBlocks(0), "FixedBlocks.size"),
        (lambda: NewlineSpans({1}, min_size=0), "min_size"),
        (lambda: NewlineSpans({1}, min_size=9, max_size=8), "max_size"),
        (lambda: NewlineSpans(set()), "newline_ids is empty"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_newline_tokens_are_found_by_their_text() -> None:
    vocabulary = ["a", "\n", " \n", "\n\n", "\\n", "b"]
    assert newline_token_ids(lambda tokens: vocabulary[tokens[0]], len(vocabulary)) == {1, 2, 3}
