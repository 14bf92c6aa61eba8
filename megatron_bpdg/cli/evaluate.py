"""`bpdg eval`: pass@k of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    from megatron_bpdg.evaluation.command import evaluate_checkpoint

    evaluate_checkpoint(
        checkpoint,
        data,
        samples=samples,
        k=k or sorted({1, samples}),
        grader_name=grader,
        chat_template=chat_template,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
        batch_size=batch_size,
        seed=seed,
        output=output,
        limit=limit,
    )
