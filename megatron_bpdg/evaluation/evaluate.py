"""pass@k of a sampler on a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.data.graders import Grader
from megatron_bpdg.data.prompts import Problem
from megatron_bpdg.data.sampler import Stream
from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.parallel.together import gather_shares, my_share
from megatron_bpdg.rollout.engine import Request, RolloutEngine, generate
from megatron_bpdg.rollout.sampling import sample_seed


def grade_all(responses: Sequence[list[int]], answers: Sequence[str], tokenizer: Any, grader: Grader) -> list[bool]:
    """Which responses (token ids) are right; collective, the ranks share the work and all get every verdict."""
    done = {
        i: bool(grader(tokenizer.decode(responses[i], skip_special_tokens=True), answers[i]))
        for i in my_share(len(responses))
    }
    return gather_shares(done, len(responses))


def evaluate(
    engine: RolloutEngine,
    benchmark: str,
    problems: Sequence[Problem],
    prompt_ids: Sequence[list[int]],
    tokenizer: Any,
    grader: Grader,
    sampling: Sampling,
    *,
    samples: int,
    step: int,
    seed: int,
) -> EvalResult:
    """Sample every problem `samples` times and grade; collective, the same result on every rank.

    The random streams do not depend on the step, so that two evaluations of a run differ by their weights alone.
    """
    places = [(problem, sample) for problem in range(len(problems)) for sample in range(samples)]
    requests = [Request(prompt_ids[p], sample_seed(seed, Stream.EVALUATION, p, s)) for p, s in places]
    responses = generate(engine, requests, sampling)
    answers = [problems[problem].answer for problem, _ in places]
    correct = [0] * len(problems)
    for (problem, _), verdict in zip(places, grade_all([r.ids for r in responses], answers, tokenizer, grader)):
        correct[problem] += verdict
    return EvalResult(
        benchmark=benchmark,
        step=step,
        samples=samples,
        problem_ids=[problem.id for problem in problems],
        correct=correct,
        truncated_fraction=sum(not response.finished for response in responses) / len(responses),
        mean_response_tokens=sum(len(response.ids) for response in responses) / len(responses),
    )
