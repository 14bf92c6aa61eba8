"""`bpdg serve`: a checkpoint on an SGLang server."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from megatron_bpdg.cli.common import console
from megatron_bpdg.serving.sglang.role import Device, Role


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
    from megatron_bpdg.parallel.platform import default_device
    from megatron_bpdg.serving.http.client import api_key
    from megatron_bpdg.serving.http.process import signals_interrupt
    from megatron_bpdg.serving.sglang.launch import as_hf, find_python, server_command
    from megatron_bpdg.serving.sglang.launch import serve as serve_in_foreground

    interpreter = find_python(python)
    key = api_key(api_key_env, "--api-key-env")
    with signals_interrupt():
        command = server_command(
            as_hf(checkpoint, export, console),
            role,
            python=interpreter,
            device=device or Device(default_device().type),
            host=host,
            port=port,
            tp=tp,
            dtype=dtype,
            context_length=context_length,
            extra=[*(flags or []), *(["--api-key", key] if key else [])],
        )
        if dry_run:
            print(command)
            return
        console.print(escape(str(command)), soft_wrap=True, highlight=False)
        try:
            serve_in_foreground(command, log or Path(f"serve-{role}-{port}.log"), deadline, console)
        except KeyboardInterrupt as interrupt:
            console.print(f"stopped by {str(interrupt) or signal.SIGINT.name}")
