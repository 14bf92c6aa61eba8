"""pass@k of a sampler, or of a checkpoint, on a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.source import iter_checkpoint
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.data.end_tokens import end_ids
from megatron_bpdg.data.graders import Grader, check_answers
from megatron_bpdg.data.prompts import Prompts, encode_prompts, load_problems
from megatron_bpdg.data.sampler import Stream
from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.parallel.together import gather_shares, my_share
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.embedded import EmbeddedEngine
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
    prompts: Prompts,
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
    problems = prompts.problems
    places = [(problem, sample) for problem in range(len(problems)) for sample in range(samples)]
    requests = [Request(prompts.ids[p], sample_seed(seed, Stream.EVALUATION, p, s)) for p, s in places]
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


def evaluate_checkpoint(
    checkpoint: Path,
    data: Sequence[Path],
    grader: Grader,
    sampling: Sampling,
    *,
    samples: int,
    chat_template: bool,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> list[EvalResult]:
    """`evaluate` of a checkpoint's weights, sampled by the embedded engine, on each file of problems.

    Raises:
        FileNotFoundError: no checkpoint or data.
        ValueError: data that does not fit, or no room for a prompt.
    """
    folder = hf_folder(checkpoint)
    config = read_hf_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ends = end_ids(folder, tokenizer, str(folder))
    longest = config.get("max_position_embeddings", 40_960) - sampling.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt in "
            f"{config['max_position_embeddings']} positions"
        )
    dtype = getattr(torch, config["dtype"] or "float32")
    results = []
    with world(Layout(), seed):
        engine = EmbeddedEngine(folder, end_ids=ends, batch_size=batch_size, dtype=dtype)
        engine.load_weights(iter_checkpoint(checkpoint), version=0, probe=None)
        for path in data:
            problems = load_problems(path)[:limit]
            check_answers(grader, problems, path)
            prompts = encode_prompts(problems, tokenizer, chat_template=chat_template, max_prompt_tokens=longest)
            result = evaluate(
                engine, path.stem, prompts, tokenizer, grader, sampling, samples=samples, step=0, seed=seed
            )
            results.append(result)
    return results
