"""Micro-batches in a row and on context-parallel shards: every token once, with what followed it in its sequence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.data.batch import MicroBatch, by_tokens, collate
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.parallel.sequence import unzigzag, zigzag

PAD = 999


def trajectories(sizes: list[tuple[int, int]]) -> list[Trajectory]:
    """Sequences in which every token has an id of its own, in blocks of 3, with a hole in each mask."""
    made = []
    for index, (prompt, response) in enumerate(sizes):
        ids = [100 * index + n for n in range(prompt + response)]
        made.append(
            Trajectory(
                problem=index,
                sample=0,
                prompt_ids=ids[:prompt],
                response_ids=ids[prompt:],
                sampler_logprobs_R=torch.zeros(response),
                finished=True,
                mask_R=torch.arange(response) != 1,
                block_R=torch.arange(response) // 3,
                teacher_logprobs_R=-torch.tensor(ids[prompt:], dtype=torch.float32),
            )
        )
    return made


def shards(given: list[Trajectory], size: int, packed: bool, length_multiple: int = 1) -> list[MicroBatch]:
    return [
        collate(
            given,
            pad_id=PAD,
            length_multiple=length_multiple,
            token_multiple=length_multiple,
            packed=packed,
            context_rank=rank,
            context_size=size,
        )
        for rank in range(size)
    ]


def rows(batch: MicroBatch) -> list[dict[str, Any]]:
    """One dict for each real response token of a shard."""
    ids, positions = (x.t().flatten() for x in (batch.input_ids_BS, batch.position_ids_BS))
    assert batch.teacher_logprobs_N is not None
    return [
        {
            "token": int(batch.token_N[n]),
            "sampled": int(batch.sampled_N[n]),
            "predicted_by": int(ids[batch.position_N[n]]),
            "position": int(positions[batch.position_N[n]]),
            "sequence": int(batch.sequence_N[n]),
            "block": int(batch.block_N[n]),
            "counts": bool(batch.mask_N[n]),
            "teacher": float(batch.teacher_logprobs_N[n]),
        }
        for n in batch.real_N.nonzero()[:, 0].tolist()
    ]


# Two tokens in all; a prompt that ends at a chunk's border; blocks that straddle it; a long one.
SIZES = [(1, 1), (8, 8), (3, 13), (4, 3), (2, 31)]
CASES = list(itertools.product((1, 2, 4), (False, True), (1, 2, 4)))


@pytest.mark.parametrize(("size", "packed", "length_multiple"), CASES)
def test_the_shards_together_are_the_batch(size: int, packed: bool, length_multiple: int) -> None:
    given = trajectories(SIZES)
    (whole,) = shards(given, 1, packed=False)
    parts = shards(given, size, packed, length_multiple)
    found = sorted((row for part in parts for row in rows(part)), key=lambda row: row["token"])
    assert found == rows(whole)
    for row in found:
        # Ids count up within a sequence, so the one before is the predecessor, shard borders or not.
        assert row["predicted_by"] == row["sampled"] - 1
        assert row["position"] == row["predicted_by"] % 100
    for part in parts:
        assert (part.num_tokens, part.num_blocks, part.num_sequences) == (56, whole.num_blocks, 5)
        assert part.num_counted == int(whole.mask_N.sum()) < part.num_tokens
        assert torch.equal(part.block_index_G, whole.block_index_G)
        assert part.input_ids_BS.shape == parts[0].input_ids_BS.shape
        assert part.input_ids_BS.shape[1] % length_multiple == 0
        assert len(part.position_N) % length_multiple == 0


@pytest.mark.parametrize(("size", "length_multiple"), list(itertools.product((1, 2, 4), (1, 2, 4))))
def test_a_row_says_where_its_sequences_are(size: int, length_multiple: int) -> None:
    parts = shards(trajectories(SIZES), size, packed=True, length_multiple=length_multiple)
    for rank, part in enumerate(parts):
        assert part.cu_seqlens is not None
        assert part.cu_seqlens.dtype == torch.int32
        lengths = part.cu_seqlens.diff().tolist()
        assert part.max_seqlen == max(lengths)
        assert int(part.cu_seqlens[-1]) == part.input_ids_BS.numel() * size
        rest = [n // size for n in lengths]
        for index, (ids, positions, length) in enumerate(
            zip(part.input_ids_BS[0].split(rest), part.position_ids_BS[0].split(rest), lengths)
        ):
            # Positions start again with every sequence, and each sequence is cut by itself.
            assert torch.equal(positions, zigzag(length, rank, size))
            real = positions < sum(SIZES[index])
            assert torch.equal(ids[real], 100 * index + positions[real])
            assert bool((ids[~real] == PAD).all())
            assert length % (2 * size if size > 1 else 1) == 0
    assert sum(part.input_ids_BS.numel() for part in parts) - sum(map(sum, SIZES)) < 5 * 2 * size + 2 * size * 4


def test_padded_batches_have_no_row_description() -> None:
    (batch,) = shards(trajectories(SIZES), 1, packed=False)
    assert batch.cu_seqlens is None


@pytest.mark.parametrize(("size", "packed"), list(itertools.product((1, 2, 4), (False, True))))
def test_nothing_to_learn_from_is_a_batch_on_every_shard(size: int, packed: bool) -> None:
    for part in shards([], size, packed, length_multiple=2):
        assert part.input_ids_BS.shape[0] == 1
        assert part.input_ids_BS.shape[1] % 2 == 0
        assert not part.real_N.any()
        assert (part.num_tokens, part.num_counted, len(part.position_N)) == (0, 0, 2)


def test_a_shard_without_tokens_of_its_own_points_at_a_hidden_state_that_exists() -> None:
    parts = shards(trajectories([(1, 1)]), 4, packed=False)
    assert [int(part.real_N.sum()) for part in parts] == [1, 0, 0, 0]
    for part in parts[1:]:
        assert not part.mask_N.any()
        assert bool(((part.position_N >= 0) & (part.position_N < part.input_ids_BS.numel())).all())
        assert part.num_counted == 1


def test_zigzag_by_hand() -> None:
    assert [zigzag(8, rank, 2).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert zigzag(5, 0, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unzigzag_puts_the_shards_together(size: int) -> None:
    whole = torch.arange(2 * size * 3)
    held = torch.stack([whole[zigzag(len(whole), rank, size)] for rank in range(size)])
    assert torch.equal(unzigzag(held), whole)
    assert torch.equal(unzigzag(held[..., None].expand(-1, -1, 2)), whole[:, None].expand(-1, 2))


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 60))
def test_micro_batches_of_a_token_budget(lengths: list[int], budget: int) -> None:
    responses = trajectories([(1, n) for n in lengths])
    chunks = by_tokens(responses, budget)
    assert sorted(t.problem for chunk in chunks for t in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or sum(lengths[t.problem] + 1 for t in chunk) <= budget
    # The longest comes first, and no two micro-batches would fit into one.
    sizes = [sum(lengths[t.problem] + 1 for t in chunk) for chunk in chunks]
    assert [chunk[0].problem for chunk in chunks[:1]] == [i for i, n in enumerate(lengths) if n == max(lengths)][:1]
    assert all(a + b > budget for a, b in itertools.combinations(sizes, 2))


def test_budget_by_hand() -> None:
    chunks = by_tokens(trajectories([(1, 4), (1, 9), (1, 2), (1, 20), (1, 4), (1, 2)]), 14)
    assert [[t.problem for t in chunk] for chunk in chunks] == [[3], [1, 2], [0, 4, 5]]
