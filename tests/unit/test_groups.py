"""Which responses a step samples and which groups it trains on, with engines that finish in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from megatron_bpdg.config.rollout import Rollout, Sampling
from megatron_bpdg.data.sampler import PromptSampler
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.rollout.engine import Finished, Request, Response
from megatron_bpdg.rollout.groups import GroupSampler

PROMPTS = [[number, number + 1] for number in range(2, 12)]
SERVERS: dict[str, Any] = {"engine": "sglang", "servers": {"urls": ["http://unused"]}}


def whole(request: Request, version: int, length: int = 4) -> Response:
    """A finished response: what was begun, and version's number for the rest."""
    begun = request.started or Response.empty()
    new = length - len(begun.ids)
    return Response(
        begun.ids + [version] * new,
        torch.cat([begun.logprobs, torch.full((new,), -float(version))]),
        True,
        torch.cat([begun.version_R, torch.full((new,), version, dtype=torch.int32)]),
    )


class Scripted:
    """Finishes requests in the order it is told, `at_once` together, and cuts the others off after one more token."""

    retries = 0

    def __init__(self, order: Sequence[int], at_once: int = 1) -> None:
        self.order, self.at_once, self.version = order, at_once, 0
        self.requests: list[Request] = []

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Scripted:
        self.requests, self.left = list(requests), [i for i in self.order if i < len(requests)]
        return self

    def __iter__(self) -> Iterator[Finished]:
        while self.left:
            now, self.left = self.left[: self.at_once], self.left[self.at_once :]
            yield [(index, whole(self.requests[index], self.version)) for index in now]

    def interrupt(self) -> Finished:
        def cut(request: Request) -> Response:
            begun = request.started or Response.empty()
            grown = whole(request, self.version, len(begun.ids) + 1)
            return Response(grown.ids, grown.logprobs, False, grown.version_R, cut_off=True)

        left, self.left = self.left, []
        return [(index, cut(self.requests[index])) for index in left]

    def load_weights(self, weights: Any, version: int, probe: Any) -> None:
        self.version = version

    def close(self) -> None:
        pass


def take(sampler: GroupSampler, engine: Scripted, step: int) -> list[list[Trajectory]]:
    return list(sampler.step(engine, step))


def test_without_extra_prompts_a_step_is_what_the_seed_draws_whatever_finishes_first() -> None:
    cfg = Rollout(prompts_per_step=3, samples_per_prompt=2)
    drawn = PromptSampler(len(PROMPTS), 3, seed=5)
    batches = []
    for order in (range(6), [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        sampler, engine = GroupSampler(cfg, PROMPTS, seed=5), Scripted(list(order))
        for step in (1, 2):
            groups = take(sampler, engine, step)
            batch = sorted((t for group in groups for t in group), key=lambda t: t.index)
            assert [t.index for t in batch] == list(range(6))
            assert [t.problem for t in batch] == [p for p in drawn.batch(step - 1) for _ in range(2)]
            batches.append([(t.problem, t.sample, t.index) for t in batch])
            assert all({t.problem for t in group} == {group[0].problem} and len(group) == 2 for group in groups)
    assert batches[0::2] == [batches[0]] * 3


def test_seeds_name_the_place_and_the_step() -> None:
    cfg = Rollout(prompts_per_step=len(PROMPTS), samples_per_prompt=2)
    seeds = []
    for step in (1, 2):
        engine = Scripted(range(20))
        take(GroupSampler(cfg, PROMPTS, seed=0), engine, step)
        seeds += [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(seeds) == 40


def test_groups_that_finish_first_are_taken_and_the_others_go_on_in_the_next_step() -> None:
    cfg = Rollout(prompts_per_step=2, samples_per_prompt=2, extra_prompts=1, **SERVERS)
    sampler = GroupSampler(cfg, PROMPTS, seed=1)
    # Of six requests, the last two groups finish; the first group has one whole response and one cut off.
    engine = Scripted([0, 4, 5, 2, 3, 1])
    first = take(sampler, engine, 1)
    asked = engine.requests
    drawn = PromptSampler(len(PROMPTS), 2, seed=1)
    order = [*drawn.batch(0), *drawn.batch(1), *drawn.batch(2)]
    assert [group[0].problem for group in first] == [order[2], order[1]]
    assert [t.index for group in first for t in group] == [0, 1, 2, 3]

    engine.version = 1
    engine.order = range(10)
    second = take(sampler, engine, 2)
    # The response that was whole is not sampled again; the one that was cut off goes on with the same seed.
    assert len(engine.requests) == 1 + 2 * 2
    resumed = engine.requests[0]
    assert resumed.started is not None
    assert (resumed.started.ids, resumed.seed) == ([0], asked[1].seed)
    assert [group[0].problem for group in second] == [order[0], order[3]]
    old, mixed = second[0]
    assert (old.version_R.tolist(), mixed.version_R.tolist()) == ([0] * 4, [0, 1, 1, 1])
    assert mixed.sampler_logprobs_R.tolist() == [0.0, -1.0, -1.0, -1.0]
    everything = [(t.problem, t.sample) for group in first + second for t in group]
    assert len(set(everything)) == len(everything), "a sample was used twice"


def test_groups_that_finish_together_beyond_what_the_step_wants_wait_for_the_next() -> None:
    cfg = Rollout(prompts_per_step=2, samples_per_prompt=2, extra_prompts=2, **SERVERS)
    sampler = GroupSampler(cfg, PROMPTS, seed=1)
    drawn = PromptSampler(len(PROMPTS), 2, seed=1)
    order = [*drawn.batch(0), *drawn.batch(1), *drawn.batch(2)]
    engine = Scripted(range(8), at_once=8)
    first = take(sampler, engine, 1)
    assert [group[0].problem for group in first] == order[:2]
    engine.version = 1
    second = take(sampler, engine, 2)
    assert len(engine.requests) == 2 * 2, "a response that was whole was sampled again"
    assert [group[0].problem for group in second] == order[2:4]
    assert {int(v) for group in second for t in group for v in t.version_R} == {0}  # type: ignore[union-attr]
    assert [t.index for group in second for t in group] == [0, 1, 2, 3]


def test_no_sample_is_lost_or_used_twice_over_many_steps() -> None:
    cfg = Rollout(prompts_per_step=2, samples_per_prompt=3, extra_prompts=2, **SERVERS)
    sampler = GroupSampler(cfg, PROMPTS, seed=3)
    used: list[tuple[int, int, int]] = []
    for step in range(1, 12):
        generator = torch.Generator().manual_seed(step)
        engine = Scripted(torch.randperm(12, generator=generator).tolist())
        engine.version = step
        groups = take(sampler, engine, step)
        assert len(groups) == 2
        used += [(t.problem, t.sample, int(t.version_R[0])) for group in groups for t in group]  # type: ignore[index]
    # A problem returns in a later epoch only, with responses begun later.
    assert len(set(used)) == len(used) == 11 * 6


def test_extra_prompts_are_for_servers() -> None:
    with pytest.raises(ValueError, match="engine: embedded does not use extra_prompts"):
        Rollout(extra_prompts=2)


def test_a_problem_drawn_twice_in_a_step_is_two_groups_of_different_samples() -> None:
    """Ten problems, eight of them drawn by step 2: the rest of it is a new epoch's, which may bring the same again."""
    cfg = Rollout(prompts_per_step=8, samples_per_prompt=2, extra_prompts=4, **SERVERS)
    for seed in range(20):
        sampler, engine = GroupSampler(cfg, PROMPTS, seed), Scripted(list(range(100)))
        for step in (1, 2):
            groups = take(sampler, engine, step)
            assert len(groups) == 8
            seeds = [request.seed for request in engine.requests]
            assert len(set(seeds)) == len(seeds)
