"""`bpdg eval`: pass@k of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_bpdg.cli.common import quiet_libraries


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="HF directory or bpdg checkpoint.")],
    data: Annotated[list[Path], typer.Option(help="Problems, .parquet or .jsonl; may be given several times.")],
    samples: Annotated[int, typer.Option(min=1, help="Responses per problem (n of pass@k).")] = 8,
    k: Annotated[list[int] | None, typer.Option(help="k of pass@k; default 1 and `samples`.")] = None,
    grader: Annotated[str, typer.Option(help="math_verify | exact | module:function")] = "math_verify",
    chat_template: Annotated[bool, typer.Option(help="Render prompts with the chat template.")] = True,
    temperature: Annotated[float, typer.Option(min=1e-6)] = 1.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16384,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of each file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for eval.jsonl; default: print only.")] = None,
) -> None:
    """pass@k of a checkpoint, with bootstrap intervals over problems, sampled by the embedded engine."""
    quiet_libraries()
    from megatron_bpdg.config.rollout import Sampling
    from megatron_bpdg.data.graders import grader_named
    from megatron_bpdg.evaluation.benchmark import append_eval
    from megatron_bpdg.evaluation.evaluate import evaluate_checkpoint
    from megatron_bpdg.tracking.tables import summary_table

    k = k or sorted({1, samples})
    if too_large := [value for value in k if not 1 <= value <= samples]:
        raise ValueError(f"--k {too_large}: must lie in 1..{samples} (--samples)")
    results = evaluate_checkpoint(
        checkpoint,
        data,
        grader_named(grader),
        Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
        samples=samples,
        chat_template=chat_template,
        batch_size=batch_size,
        seed=seed,
        limit=limit,
    )
    rows = []
    for result in results:
        row: dict[str, object] = {"benchmark": result.benchmark, "problems": len(result.problem_ids)}
        for value in k:
            row[f"pass@{value} %"] = result.pass_at(value).percent
        rows.append({**row, "truncated": result.truncated_fraction, "tokens": result.mean_response_tokens})
        if output is not None:
            append_eval(output, result)
    Console().print(summary_table(rows, title=f"{checkpoint}, {samples} samples per problem, 95 % intervals"))
