"""`bpdg`: train, eval, convert, inspect the installation, report."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from megatron_bpdg.parallel.launch import launch, report_to_launcher
from megatron_bpdg.serving.role import Device, Role

if TYPE_CHECKING:
    from megatron_bpdg.config.schema import RunConfig

app = typer.Typer(
    help="On-policy distillation with blockwise policy-drift gating on Megatron-Core.\n\n"
    "A run is one YAML file: `bpdg train examples/quickstart/opd.yaml` trains, `bpdg report RUN` draws it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
task_app = typer.Typer(help="Make the data of the embedded task.", no_args_is_help=True)
app.add_typer(task_app, name="task")
console = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config, e.g. `training.lr=1e-6 gate.partition.size=32 gate=null`."),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see `bpdg schema` for every field.")],
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the run directory first if it exists.")] = False,
    check: Annotated[bool, typer.Option(help="Only validate the config and the paths it names.")] = False,
) -> None:
    """Train as a config says.

    Started as a plain command, it launches one process per rank of `layout` on this machine. Under torchrun
    (WORLD_SIZE is set) it is one of the ranks.
    """
    from megatron_bpdg.config import check_paths, load_config

    cfg = load_config(config, overrides or [])
    check_paths(cfg)
    if check:
        console.print(f"{config}: valid; needs {cfg.layout.world_size} process(es)")
        return
    if int(os.environ.get("RANK", "0")) == 0:
        _clear_output(cfg, config, overwrite)
    if "WORLD_SIZE" not in os.environ and cfg.layout.world_size > 1:
        launch("megatron_bpdg.cli", ["train", str(config), *(overrides or [])], cfg.layout.world_size)
        return
    _quiet_libraries()
    from megatron_bpdg.training.loop import TRAINERS

    TRAINERS[cfg.kind](cfg)


@app.command("eval")
def evaluate_command(
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
    _quiet_libraries()
    from megatron_bpdg.config.schema import Sampling
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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="HF directory or Megatron checkpoint; told apart by content.")],
    target: Annotated[Path, typer.Argument(help="New directory; appears only when complete.")],
    to: Annotated[str | None, typer.Option(help="hf | megatron; default: what the source is not.")] = None,
    hf_source: Annotated[
        Path | None, typer.Option(help="HF directory with config and tokenizer, for a Megatron checkpoint without any.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 | bfloat16 | float16; default: as stored, byte for byte.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Go back from the result and compare every tensor's bytes.")] = False,
    verify_logits: Annotated[
        str | None, typer.Option(help="Text on which HF transformers and Megatron-Core must agree.")
    ] = None,
    max_file_gb: Annotated[float | None, typer.Option(min=1e-6, help="GB per data file; default 5 (HF), 2.")] = None,
    memory_gb: Annotated[float, typer.Option(min=1e-3, help="GB of tensors held at once, or the largest.")] = 1.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read and that write.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Convert between HF safetensors and Megatron checkpoints, byte for byte; see docs/converters.md.

    Of an interrupted conversion nothing is left. Under torchrun its ranks share the work.
    """
    from functools import partial

    from megatron_bpdg.checkpoint.command import convert as run_convert
    from megatron_bpdg.checkpoint.command import options_of

    options = options_of(dtype, max_file_gb, memory_gb, workers, overwrite=overwrite)
    agree = None
    if verify_logits is not None:
        _quiet_libraries()
        from megatron_bpdg.evaluation import logits

        agree = partial(logits.verify_logits, text=verify_logits)
    run_convert(source, target, options, to=to, hf_source=hf_source, verify=verify, agree=agree)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="HF directory, torch_dist or mp_rank checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds, from its headers: format, layout, dtypes, parameters, iteration, completeness."""
    import json

    from megatron_bpdg.checkpoint.describe import describe, description_table

    description = describe(path)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        Console().print(description_table(description))


@app.command()
def init(
    target: Annotated[Path, typer.Argument(help="New HF directory.")],
    tokenizer: Annotated[Path, typer.Option(help="HF tokenizer directory; copied along.")],
    layers: Annotated[int, typer.Option(min=1)] = 2,
    hidden: Annotated[int, typer.Option(min=1)] = 64,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: Annotated[int, typer.Option(min=2)] = 16,
    ffn: Annotated[int, typer.Option(min=1)] = 128,
    vocab_size: Annotated[int, typer.Option(min=1, help="Rows of the embedding.")] = 151_936,
    tied: Annotated[bool, typer.Option(help="Share embedding and output head.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small Qwen3 with fresh seeded weights, for trying things out."""
    _quiet_libraries()
    import tempfile

    import torch

    from megatron_bpdg.checkpoint.hf import write_fresh_checkpoint
    from megatron_bpdg.models.hf_config import write_qwen3_config

    if target.exists():
        raise ValueError(f"{target} exists; choose a new directory")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        write_qwen3_config(
            config,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            vocab_size=vocab_size,
            tied=tied,
        )
        write_fresh_checkpoint(config, tokenizer, target, seed=seed, dtype=torch.float32)
    console.print(f"written: {target}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `bpdg train`.")],
    compare: Annotated[list[Path] | None, typer.Option(help="Another run to overlay; repeatable.")] = None,
) -> None:
    """Write RUN/report.html: pass@k, loss, gates, the drift heat map."""
    from megatron_bpdg.report.html import write_report
    from megatron_bpdg.report.passk import summary_rows
    from megatron_bpdg.report.progress import summary_table
    from megatron_bpdg.report.run import load_run

    page = write_report(run, compare or [])
    rows = [{"run": path.name, **row} for path in [run, *(compare or [])] for row in summary_rows(load_run(path))]
    if rows:
        Console().print(summary_table(rows, title="pass@k in %, 95 % bootstrap intervals over problems"))
    console.print(f"report: {page}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    import json

    from megatron_bpdg.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def serve(
    role: Annotated[Role, typer.Argument(help="student: rollouts and new weights; teacher: scores of given text.")],
    checkpoint: Annotated[Path, typer.Argument(help="HF directory, or Megatron checkpoint, which is exported first.")],
    flags: Annotated[list[str] | None, typer.Argument(help="SGLang's own flags, after `--`.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 30000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism, in devices.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32 | bfloat16 | float16; default: what config.json names.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and response together, in tokens; default: the model's.")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="Default: cuda where this machine has it.")] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has sglang; default: $BPDG_SGLANG_PYTHON, or this one."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="HF directory for a Megatron checkpoint; default: RUN/served-ITERATION.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="The server's output; default: serve-ROLE-PORT.log here.")] = None,
    deadline: Annotated[float, typer.Option(min=1.0, help="Seconds that it has to become healthy.")] = 1800.0,
    dry_run: Annotated[bool, typer.Option(help="Only print the command.")] = False,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key that clients must send.")
    ] = None,
) -> None:
    """Serve a checkpoint with SGLang until Ctrl-C or SIGTERM; see docs/sglang.md."""
    from megatron_bpdg.serving.command import serve as run_server

    run_server(
        role,
        checkpoint,
        python=python,
        export=export,
        device=device,
        host=host,
        port=port,
        tp=tp,
        dtype=dtype,
        context_length=context_length,
        log=log,
        deadline_s=deadline,
        dry_run=dry_run,
        api_key_env=api_key_env,
        extra=flags or [],
        console=console,
    )


@app.command()
def doctor(
    server: Annotated[list[str] | None, typer.Option(help="URL of an SGLang server to ask; repeatable.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose tokenizer the servers must have: the student's.")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the servers' API key.")] = None,
) -> None:
    """Say what this installation, and servers, can do and what is missing."""
    from megatron_bpdg.doctor import diagnose

    if not diagnose(Console(), server or [], checkpoint, api_key_env):
        raise typer.Exit(1)


@task_app.command("arithmetic")
def arithmetic(
    output: Annotated[Path, typer.Argument(help="Directory for splits, traces, tokenizer and two configs.")],
    seed: Annotated[int, typer.Option()] = 0,
    train_problems: Annotated[int, typer.Option(min=1)] = 20_000,
    test_problems: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Worked arithmetic: seeded problems, their worked traces, a character tokenizer, two model shapes."""
    from megatron_bpdg.data.arithmetic import make_quickstart

    make_quickstart(output, seed, train_problems, test_problems)
    console.print(f"arithmetic task: {output}")


def _clear_output(cfg: RunConfig, config: Path, overwrite: bool) -> None:
    """Refuse an occupied run directory, or delete it if asked to and if it is nothing but an earlier run."""
    from megatron_bpdg.config.load import input_paths

    output = cfg.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"output: {output} is not empty; choose another directory or pass --overwrite")
        if not (output / "config.yaml").is_file() and not (output / "init").is_dir():
            raise ValueError(f"output: {output} was not written by bpdg train; --overwrite does not delete it")
        needed = {"the config file": config, "the working directory": Path.cwd(), **input_paths(cfg)}
        if inside := [name for name, path in needed.items() if path.resolve().is_relative_to(output.resolve())]:
            raise ValueError(f"--overwrite would delete {', '.join(inside)}, inside output: {output}")
        shutil.rmtree(output)


def _quiet_libraries() -> None:
    """Keep other packages' notices about optional extras and renamed functions out of the run's output."""
    import warnings

    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    """Entry point: errors that name their remedy are printed as one message, without a traceback."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("BPDG_TRACEBACK"):
            raise
        if not report_to_launcher(str(error)):
            console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        # Python prints the traceback; the launcher should quote this rank and not one that it dragged along.
        report_to_launcher(f"{type(error).__name__}: {error}; the traceback is above")
        raise


if __name__ == "__main__":
    main()
