"""The loop's own decisions: who learns from which response in which update, and what happens to empty responses."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.data.prompts import Problem, Prompts
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.partition import FixedBlocks
from megatron_bpdg.models.policy import to_batches
from megatron_bpdg.parallel.mesh import Mesh
from megatron_bpdg.training.plan import Update, first_pass, micro_batches, plan_updates
from megatron_bpdg.training.run import Run
from megatron_bpdg.training.source import RolloutSource


def config(minibatches: int = 1, micro_batch_size: int = 2, seed: int = 0, epochs: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": "unused",
            "seed": seed,
            "student": {"checkpoint": "unused"},
            "teacher": {"checkpoint": "unused"},
            "data": {"train": "unused"},
            "rollout": {"prompts_per_step": 100, "samples_per_prompt": 2},
            "objective": {"name": "sampled_token"},
            "training": {"minibatches": minibatches, "micro_batch_size": micro_batch_size, "epochs": epochs},
        }
    )


def replica(data_rank: int = 0, data_size: int = 1) -> Mesh:
    group = cast(Any, SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    return Mesh(group, group, group, is_last_stage=True, data_rank=data_rank, data_size=data_size)


def student(vocab: int = 50) -> Any:
    return SimpleNamespace(
        mesh=replica(),
        shape=SimpleNamespace(vocab_size=vocab),
        layout=Layout(),
        length_multiple=1,
        packed=False,
    )


def responses(count: int, empty: tuple[int, ...] = ()) -> list[Trajectory]:
    made = []
    for index in range(count):
        length = 0 if index in empty else 1 + index % 4
        made.append(Trajectory(index, 0, [1], [2] * length, torch.full((length,), -1.0), finished=True, index=index))
    return made


def problems(chunks: list[list[Trajectory]]) -> list[int]:
    return [t.problem for chunk in chunks for t in chunk]


def updates_of(count: int, size: int, cfg: RunConfig, epoch: int, step: int = 1) -> list[list[list[int]]]:
    """problems[replica][update]"""
    batch = responses(count)
    return [
        [problems(u.micro_batches) for u in plan_updates(batch, cfg, replica(rank, size), step) if u.epoch == epoch]
        for rank in range(size)
    ]


@given(
    count=st.integers(1, 30),
    size=st.integers(1, 4),
    minibatches=st.integers(1, 5),
    micro=st.integers(1, 6),
    epoch=st.integers(0, 2),
)
def test_the_same_updates_whatever_the_layout(count: int, size: int, minibatches: int, micro: int, epoch: int) -> None:
    cfg = config(minibatches, micro, epochs=3)
    (whole,) = updates_of(count, 1, cfg, epoch)
    replicas = updates_of(count, size, cfg, epoch)
    assert len({len(updates) for updates in replicas}) == 1
    for update, expected in enumerate(whole):
        shares = [replica[update] for replica in replicas]
        assert sorted(chain(*shares)) == sorted(expected)
        for rank, share in enumerate(shares):
            # A replica keeps the order, and a response belongs to one replica for good: its teacher payload is there.
            assert share == [problem for problem in expected if problem % size == rank]
    assert sorted(chain(*whole)) == list(range(count))
    assert all(expected for expected in whole), "an update without a single response has no defined loss"


def test_the_first_epoch_keeps_the_sampled_order_and_later_ones_shuffle_reproducibly() -> None:
    cfg = config(minibatches=2, epochs=3)
    (first,) = updates_of(20, 1, cfg, epoch=0)
    assert first == [list(range(10)), list(range(10, 20))]
    orders = {
        (seed, step, epoch): str(updates_of(20, 1, config(2, seed=seed, epochs=3), epoch, step))
        for seed in (0, 1)
        for step in (1, 2)
        for epoch in (1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    assert orders[0, 1, 1] == str(updates_of(20, 1, cfg, epoch=1))
    assert str([first]) not in orders.values()


def test_micro_batches_have_the_configured_size() -> None:
    assert [len(chunk) for chunk in micro_batches(responses(7), config(micro_batch_size=3), replica())] == [3, 3, 1]


def test_a_replica_without_responses_gets_an_empty_micro_batch() -> None:
    (update,) = plan_updates(responses(1), config(), replica(data_rank=1, data_size=2), step=1)
    assert update.micro_batches == [[]]
    (batch,) = to_batches(update.micro_batches, student())
    assert not batch.mask_N.any()


def test_the_first_pass_has_every_response_once_in_the_micro_batches_of_the_first_epoch() -> None:
    updates = plan_updates(responses(7), config(minibatches=2, epochs=3), replica(), step=1)
    assert [update.epoch for update in updates] == [0, 0, 1, 1, 2, 2]
    assert first_pass(updates) == [*updates[0].micro_batches, *updates[1].micro_batches]
    assert problems(first_pass(updates)) == list(range(7))


class Groupwise:
    """Gives `RolloutSource` these groups, and what it holds of a run."""

    def __init__(self, *groups: list[Trajectory], vocab: int = 50) -> None:
        self.asked: list[int] = []
        teacher = SimpleNamespace(prefetch=lambda usable: self.asked.extend(t.problem for t in usable))
        self.run = SimpleNamespace(
            cfg=config(),
            student=student(vocab=vocab),
            partition=FixedBlocks(2),
            engine=None,
            teacher=teacher,
            tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: str(len(ids))),
            grader=lambda response, answer: response == answer,
            prompts=Prompts([Problem(str(i), [], answer="2") for i in range(200)], [[1]] * 200),
        )
        self.source = RolloutSource(cast(Run, self.run))
        self.source.groups = cast(Any, SimpleNamespace(step=lambda engine, step: iter(groups)))

    def take(self) -> list[Trajectory]:
        return self.source.take(1, lambda group: None)


def test_empty_responses_are_left_out() -> None:
    step = Groupwise(responses(6, empty=(1, 4)))
    kept = step.take()
    assert step.asked == [0, 2, 3, 5]
    assert [t.problem for t in kept] == [0, 2, 3, 5]
    assert [t.block_R.tolist() for t in kept] == [[0], [0, 0, 1], [0, 0, 1, 1], [0, 0]]


def test_responses_are_graded() -> None:
    assert [t.correct for t in Groupwise(responses(6)).take()] == [False, True, False, False, False, True]


def test_more_minibatches_than_responses_left_still_give_no_empty_update() -> None:
    kept = Groupwise(responses(4, empty=(0, 1))).take()
    updates = plan_updates(kept, config(minibatches=4), replica(), step=1)
    assert updates == [Update(0, [[kept[0]]]), Update(0, [[kept[1]]])]


def test_only_empty_responses_are_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"all 200 responses of this step are empty: check .* rollout\.sampling"):
        Groupwise(responses(3, empty=(0, 1, 2))).take()


def test_the_batch_has_the_order_of_its_prompts_whatever_finished_first() -> None:
    batch = responses(5)
    assert problems([Groupwise(*([batch[i]] for i in (3, 0, 4, 1, 2))).take()]) == [0, 1, 2, 3, 4]


def test_a_dropped_response_moves_no_other_to_another_replica() -> None:
    (whole,) = plan_updates(responses(6), config(), replica(1, 2), step=1)
    (update,) = plan_updates(Groupwise(responses(6, empty=(0,))).take(), config(), replica(1, 2), step=1)
    assert problems(whole.micro_batches) == problems(update.micro_batches) == [1, 3, 5]


def test_malformed_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"problem 0, sample 0: token id 2 is outside the vocabulary of 2"):
        Groupwise(responses(2), vocab=2).take()
    broken = responses(3)
    broken[2].sampler_logprobs_R[1] = -torch.inf
    with pytest.raises(ValueError, match=r"problem 2, sample 0: the sampler's log-prob of response token 1 is -inf"):
        Groupwise(broken).take()
