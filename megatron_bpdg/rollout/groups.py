"""Which responses a step samples, and which groups of them it trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_bpdg.config.rollout import Rollout
from megatron_bpdg.data.sampler import PromptSampler, Stream
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.rollout.engine import Request, Response, RolloutEngine
from megatron_bpdg.rollout.sampling import sample_seed


# Two groups of the same prompt are two groups.
@dataclass(eq=False)
class _Group:
    """All samples of one prompt, drawn for a step; `started` are cut off and wait to be gone on with."""

    step: int
    problem: int
    seeds: list[int]
    done: dict[int, Response] = field(default_factory=dict)
    started: dict[int, Response] = field(default_factory=dict)


class GroupSampler:
    """Samples each step's prompts; with `extra_prompts`, also others, and takes the groups that finish first.

    Without extra prompts a step trains on the prompts that the seed draws for it, whatever finishes when. With them,
    groups that are not complete when enough others are keep what they have, go on in the next step under its weights,
    and their responses then have tokens of several weight versions.

    Args:
        cfg: the rollout section.
        prompt_ids: of every problem.
        seed: the run's.
    """

    def __init__(self, cfg: Rollout, prompt_ids: Sequence[list[int]], seed: int) -> None:
        self.cfg, self.prompt_ids, self.seed = cfg, prompt_ids, seed
        self._order = PromptSampler(len(prompt_ids), cfg.prompts_per_step, seed)
        self._waiting: list[_Group] = []
        self._drawn = 0

    def step(self, engine: RolloutEngine, step: int) -> Iterator[list[Trajectory]]:
        """Complete groups of the step as they finish, `prompts_per_step` in all; the same on every rank."""
        wanted = self.cfg.prompts_per_step
        groups = self._waiting
        while len(groups) < wanted + self.cfg.extra_prompts:
            groups.append(self._draw(step, groups))
        places = [(g, s) for g in groups for s in range(len(g.seeds)) if s not in g.done]
        stream = engine.stream(
            [Request(self.prompt_ids[g.problem], g.seeds[s], g.started.get(s)) for g, s in places], self.cfg.sampling
        )
        taken: list[_Group] = []

        def take() -> Iterator[list[Trajectory]]:
            for number, group in enumerate(groups):
                if len(group.done) == len(group.seeds) and group not in taken and len(taken) < wanted:
                    taken.append(group)
                    yield self._trajectories(group, len(taken) - 1 if self.cfg.extra_prompts else number)

        yield from take()
        for finished in stream:
            for index, response in finished:
                group, sample = places[index]
                group.done[sample] = response
            yield from take()
            if len(taken) == wanted:
                break
        for index, response in stream.interrupt():
            group, sample = places[index]
            (group.started if response.cut_off else group.done)[sample] = response
        self._waiting = [group for group in groups if group not in taken]

    def _draw(self, step: int, others: Sequence[_Group]) -> _Group:
        batch, place = divmod(self._drawn, self.cfg.prompts_per_step)
        problem = self._order.batch(batch)[place]
        self._drawn += 1
        # The end of one epoch and the start of the next may bring a problem twice in a step.
        first = sum(len(g.seeds) for g in others if (g.step, g.problem) == (step, problem))
        samples = range(first, first + self.cfg.samples_per_prompt)
        return _Group(
            step, problem, [sample_seed(self.seed, Stream.ROLLOUT, step, problem, sample) for sample in samples]
        )

    def _trajectories(self, group: _Group, place: int) -> list[Trajectory]:
        return [
            Trajectory(
                problem=group.problem,
                sample=sample,
                prompt_ids=self.prompt_ids[group.problem],
                response_ids=response.ids,
                sampler_logprobs_R=response.logprobs,
                finished=response.finished,
                version_R=response.version_R,
                index=place * len(group.seeds) + sample,
            )
            for sample, response in sorted(group.done.items())
        ]
