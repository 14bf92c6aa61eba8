"""Trajectories to micro-batches: which hidden state predicts which token, blocks, filler and the empty batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bpdg.data.batch import MicroBatch, collate, up_to
from megatron_bpdg.data.trajectory import Trajectory

PAD = 9


def trajectory(prompt: list[int], response: list[int], blocks: list[int] | None = None, **fields: Any) -> Trajectory:
    return Trajectory(
        problem=3,
        sample=1,
        prompt_ids=prompt,
        response_ids=response,
        sampler_logprobs_R=torch.full((len(response),), -1.0),
        finished=True,
        block_R=torch.tensor(blocks if blocks is not None else [0] * len(response)),
        **fields,
    )


def batch_of(*trajectories: Trajectory, length_multiple: int = 1, token_multiple: int = 1) -> MicroBatch:
    return collate(trajectories, pad_id=PAD, length_multiple=length_multiple, token_multiple=token_multiple)


SHORT = trajectory([1, 2], [3, 4, 5], [0, 0, 1])
LONG = trajectory([6], [7, 8, 1, 2], [0, 1, 1, 2])


def predicted_by(batch: MicroBatch) -> list[list[int]]:
    """(sequence, column) of the hidden state that predicts each real token; flat positions are s * B + b."""
    size = len(batch.input_ids_BS)
    return [[int(p) % size, int(p) // size] for p in batch.position_N[batch.mask_N]]


def test_two_sequences_by_hand() -> None:
    batch = batch_of(SHORT, LONG)
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 1, 2]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4]] * 2
    # The first response token is predicted by the last prompt token, and so on.
    assert predicted_by(batch) == [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert batch.position_N.tolist() == [2, 4, 6, 1, 3, 5, 7]
    assert batch.sampled_N.tolist() == [3, 4, 5, 7, 8, 1, 2]
    assert batch.sequence_N.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.block_N.tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert batch.block_index_G.tolist() == [0, 1, 0, 1, 2]
    assert (batch.num_sequences, batch.num_blocks) == (2, 5)
    assert batch.mask_N.all()
    assert batch.old_logprobs_N is None
    assert batch.teacher_logprobs_N is None


def test_each_predicting_position_is_followed_by_its_token() -> None:
    ragged = [trajectory(list(range(1 + i)), list(range(2 + 3 * i % 5))) for i in range(5)]
    batch = batch_of(*ragged, length_multiple=4, token_multiple=4)
    for (row, column), token in zip(predicted_by(batch), batch.sampled_N[batch.mask_N].tolist()):
        assert batch.input_ids_BS[row, column + 1] == token
    assert batch.mask_N.sum() == sum(len(t.response_ids) for t in ragged)


def test_padding_to_multiples_is_right_padding_and_masked_filler() -> None:
    batch = batch_of(SHORT, LONG, length_multiple=4, token_multiple=4)
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5, PAD, PAD, PAD], [6, 7, 8, 1, 2, PAD, PAD, PAD]]
    assert len(batch.position_N) == 8
    assert batch.mask_N.tolist() == [True] * 7 + [False]
    # Filler repeats a real token: any position that exists will do, as nothing of it counts.
    for values_N in (batch.position_N, batch.sampled_N, batch.sequence_N, batch.block_N):
        assert values_N[7] == values_N[0]
    assert batch.num_blocks == 5


def test_already_a_multiple_gets_no_filler() -> None:
    batch = batch_of(trajectory([1], [2, 3, 4]), length_multiple=4, token_multiple=3)
    assert batch.input_ids_BS.shape == (1, 4)
    assert batch.mask_N.tolist() == [True] * 3


def test_payloads_follow_their_tokens() -> None:
    def filled(t: Trajectory, start: int) -> Trajectory:
        count = len(t.response_ids)
        values_R = torch.arange(start, start + count).float()
        return trajectory(
            t.prompt_ids,
            t.response_ids,
            t.block_R.tolist(),
            old_logprobs_R=-values_R,
            teacher_logprobs_R=-2 * values_R,
            teacher_support_RK=torch.stack([values_R, values_R + 100], 1).int(),
            teacher_support_logprobs_RK=torch.stack([-values_R, -values_R - 100], 1),
            teacher_full_RV=values_R[:, None].expand(-1, 6),
        )

    batch = batch_of(filled(SHORT, 10), filled(LONG, 20), token_multiple=8)
    order = [10, 11, 12, 20, 21, 22, 23, 10]
    expected_N = torch.tensor(order).float()

    def check(actual: Tensor | None, expected: Tensor) -> None:
        assert actual is not None
        assert torch.equal(actual, expected)

    check(batch.old_logprobs_N, -expected_N)
    check(batch.teacher_logprobs_N, -2 * expected_N)
    check(batch.teacher_support_NK, torch.stack([expected_N, expected_N + 100], 1).int())
    check(batch.teacher_support_logprobs_NK, torch.stack([-expected_N, -expected_N - 100], 1))
    check(batch.teacher_full_NV, expected_N[:, None].expand(-1, 6))


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_trajectories_give_a_batch_that_counts_nothing(multiple: int) -> None:
    batch = batch_of(length_multiple=multiple, token_multiple=multiple)
    assert batch.input_ids_BS.shape[0] == 1
    assert batch.input_ids_BS.shape[1] % multiple == 0
    assert len(batch.position_N) == multiple
    assert not batch.mask_N.any()
    assert bool((batch.position_N < batch.input_ids_BS.numel()).all())
    assert (batch.num_blocks, len(batch.block_index_G)) == (1, 1)
    assert bool((batch.block_N < batch.num_blocks).all())
    assert bool((batch.sequence_N < batch.num_sequences).all())


def test_moving_keeps_everything() -> None:
    batch = batch_of(SHORT, LONG)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.position_N, batch.position_N)
    assert (moved.num_blocks, moved.old_logprobs_N) == (5, None)
    assert batch.to(torch.device("meta")).sampled_N.device.type == "meta"


def test_a_good_trajectory_passes_the_check() -> None:
    SHORT.check(vocab_size=6)


@pytest.mark.parametrize(
    ("prompt", "response", "logprobs", "message"),
    [
        ([1], [2, 3], [-1.0], r"problem 3, sample 1: 2 response tokens but 1 log-probs"),
        ([1], [2, 6], [-1.0, -1.0], r"problem 3, sample 1: token id 6 is outside the vocabulary of 6"),
        ([-1], [2], [-1.0], r"token id -1 is outside"),
        ([1], [2, 3], [-1.0, -torch.inf], r"log-prob of response token 1 is -inf"),
        ([1], [2, 3], [torch.nan, -1.0], r"log-prob of response token 0 is nan"),
        ([1], [2, 3], [-1.0, torch.inf], r"log-prob of response token 1 is inf"),
    ],
)
def test_what_would_corrupt_a_batch_is_named(
    prompt: list[int], response: list[int], logprobs: list[float], message: str
) -> None:
    broken = trajectory(prompt, response)
    broken.sampler_logprobs_R = torch.tensor(logprobs)
    with pytest.raises(ValueError, match=message):
        broken.check(vocab_size=6)


def test_masked_response_tokens_keep_their_place_and_do_not_count() -> None:
    def made(mask: list[bool] | None) -> Trajectory:
        return Trajectory(
            problem=0,
            sample=0,
            prompt_ids=[1, 2],
            response_ids=[3, 4, 5],
            sampler_logprobs_R=torch.zeros(3),
            finished=True,
            mask_R=None if mask is None else torch.tensor(mask),
            block_R=torch.tensor([0, 0, 1]),
        )

    batch = collate([made([True, False, True]), made(None)], pad_id=0, length_multiple=1, token_multiple=4)
    assert batch.mask_N.tolist() == [True, False, True, True, True, True, False, False]
    assert batch.real_N.tolist() == [True] * 6 + [False] * 2
    assert batch.block_N.tolist()[:6] == [0, 0, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="3 response tokens but a mask of 2"):
        made([True, False]).check(vocab_size=9)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([3, 2, 1, 5], [[3, 2], [1], [5]]),
        ([9, 1, 4], [[9], [1, 4]]),
        ([5, 5], [[5], [5]]),
        ([0, 0], [[0, 0]]),
    ],
)
def test_consecutive_items_up_to_a_limit(sizes: list[int], groups: list[list[int]]) -> None:
    assert list(up_to(sizes, sizes, limit=5)) == groups
