"""`bpdg eval`: pass@k of a checkpoint on files of problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.source import iter_checkpoint
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.data.graders import grader_named
from megatron_bpdg.data.prompts import BOXED_SUFFIX, encode_prompts, load_problems, special_ids
from megatron_bpdg.evaluation.benchmark import EvalResult, append_eval
from megatron_bpdg.evaluation.bootstrap import bootstrap
from megatron_bpdg.evaluation.evaluate import evaluate
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.tracking.tables import summary_table


def evaluate_checkpoint(
    checkpoint: Path,
    data: Sequence[Path],
    *,
    samples: int,
    k: Sequence[int],
    grader_name: str,
    chat_template: bool,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    output: Path | None,
    limit: int | None = None,
) -> list[EvalResult]:
    """Sample with the embedded engine, grade, print a table, and keep the counts in ``output/eval.jsonl`` if asked to.

    Raises:
        ValueError: k outside 1..samples, or data that does not fit; FileNotFoundError: no checkpoint or data.
    """
    if too_large := [value for value in k if not 1 <= value <= samples]:
        raise ValueError(f"--k {too_large}: must lie in 1..{samples} (--samples)")
    folder = hf_folder(checkpoint)
    config = read_hf_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    grader = grader_named(grader_name)
    eos_id, pad_id = special_ids(tokenizer, f"the tokenizer of {folder}")
    results = []
    with world(Layout(), seed):
        engine = EmbeddedEngine(
            folder,
            eos_id=eos_id,
            pad_id=pad_id,
            batch_size=batch_size,
            dtype=getattr(torch, config["dtype"] or "float32"),
        )
        engine.load_weights(iter_checkpoint(checkpoint), version=0, probe=None)
        for path in data:
            problems = load_problems(path, suffix=BOXED_SUFFIX)[:limit]
            longest = config.get("max_position_embeddings", 40_960) - sampling.max_new_tokens
            if longest < 1:
                raise ValueError(
                    f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt in "
                    f"{config['max_position_embeddings']} positions"
                )
            encoded = encode_prompts(problems, tokenizer, chat_template=chat_template, max_prompt_tokens=longest)
            results.append(
                evaluate(
                    engine,
                    path.stem,
                    encoded.problems,
                    encoded.ids,
                    tokenizer,
                    grader,
                    sampling,
                    samples=samples,
                    step=0,
                    seed=seed,
                )
            )
    rows = []
    for result in results:
        row: dict[str, object] = {"benchmark": result.benchmark, "problems": len(result.problem_ids)}
        for value in k:
            score = bootstrap(result.correct, samples, value)
            row[f"pass@{value} %"] = (
                f"{100 * result.pass_at(value):.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
            )
        rows.append({**row, "truncated": result.truncated_fraction, "tokens": result.mean_response_tokens})
        if output is not None:
            append_eval(output, result)
    Console().print(summary_table(rows, title=f"{checkpoint}, {samples} samples per problem, 95 % intervals"))
    return results
