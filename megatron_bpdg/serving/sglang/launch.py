"""`bpdg serve`: an SGLang server's Python, its checkpoint as an HF directory, its command line, and its run."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import Version
from rich.console import Console
from rich.text import Text

from megatron_bpdg.checkpoint.convert import Options, megatron_to_hf
from megatron_bpdg.checkpoint.source import DTYPES, is_megatron, open_megatron
from megatron_bpdg.serving.http.client import ask
from megatron_bpdg.serving.http.process import Command, RunningServer
from megatron_bpdg.serving.sglang.facts import server_facts
from megatron_bpdg.serving.sglang.role import Device, Role
from megatron_bpdg.tracking.files import write_text

MIN_SGLANG = Version("0.5.23")
PYTHON_VARIABLE = "BPDG_SGLANG_PYTHON"
EXPORT_RECORD = "bpdg_export.json"

# The server answers from logits of the whole vocabulary, float32, for this many bytes of rows at a time.
_LOGITS_BYTES = 2**30
# `bpdg serve` needs to know these itself, so they have options of their own.
_OWN_FLAGS = {
    "--model-path": "CHECKPOINT",
    "--model": "CHECKPOINT",
    "--host": "--host",
    "--port": "--port",
    "--dtype": "--dtype",
    "--tp-size": "--tp",
    "--tensor-parallel-size": "--tp",
    "--device": "--device",
    "--context-length": "--context-length",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ServerCommand(Command):
    """How to start an SGLang server.

    Attributes:
        vocab_size: rows of the model's output layer.
        Others: see `Command`.
    """

    hints: ClassVar[Mapping[str, str]] = {
        "address already in use": "its port was taken meanwhile; choose another --port",
        "out of memory": "out of memory: a smaller --mem-fraction-static, or a larger --tp",
        "not enough memory": "out of memory: a smaller --mem-fraction-static, or a larger --tp",
        "unrecognized arguments": "a flag after `--` is none of SGLang's",
    }
    vocab_size: int

    @property
    def api_key(self) -> str | None:
        """What its clients must send, where its flags ask for it."""
        parts = [part for argument in self.argv for part in argument.split("=", 1)]
        return parts[parts.index("--api-key") + 1] if "--api-key" in parts[:-1] else None

    def __str__(self) -> str:
        """One line for a shell, without the API key."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        shown = [
            "--api-key=..." if part.startswith("--api-key=") else "..." if before == "--api-key" else part
            for before, part in zip(("", *self.argv), self.argv)
        ]
        return " ".join(["env", *assignments, shlex.join(shown)])


def server_command(
    model: Path,
    role: Role,
    *,
    python: str,
    device: Device,
    host: str = "127.0.0.1",
    port: int = 30000,
    tp: int = 1,
    dtype: str | None = None,
    context_length: int | None = None,
    extra: Sequence[str] = (),
) -> ServerCommand:
    """The command that serves a model. Variables that this process's environment has already keep their values.

    Args:
        model: HF directory with weights and tokenizer.
        role: a teacher's logits are computed in bounded pieces, however long the texts are that it scores.
        python: interpreter that has sglang.
        device: where the model computes.
        host, port: where the server listens.
        tp: tensor parallelism, in devices.
        dtype: float32, bfloat16 or float16; None: the one that config.json names. Never "auto", by which SGLang would
            turn float32 into float16.
        context_length: longest prompt and response together, in tokens; None: the model's.
        extra: more flags of SGLang. They replace those chosen here.

    Raises:
        FileNotFoundError: `model` has no config.json.
        ValueError: no tokenizer, no dtype, or an extra flag that is an option of `bpdg serve`.
    """
    config, text = _read_config(model)
    if not any((model / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{model} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); the server needs the student's")
    if not dtype:
        named = (part.get(name) for part in (config, text) for name in ("dtype", "torch_dtype"))
        dtype = str(next(filter(None, named), "")).removeprefix("torch.")
        if not dtype:
            raise ValueError(f"{model}/config.json names no dtype; pass --dtype, one of {', '.join(DTYPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
    for flag in extra:
        if option := _OWN_FLAGS.get(flag.split("=")[0]):
            raise ValueError(f"{flag} after `--`: bpdg serve has {option} for it, before the `--`")
    if extra and not extra[0].startswith("-"):
        raise ValueError(f"{extra[0]!r} is no flag of SGLang; only its flags follow the checkpoint, after `--`")
    vocab_size = int(text["vocab_size"])
    flags: dict[str, str | None] = {
        "--model-path": str(model.absolute()),
        "--host": host,
        "--port": str(port),
        "--device": str(device),
        "--dtype": dtype,
        "--tp-size": str(tp),
    }
    if context_length is not None:
        flags["--context-length"] = str(context_length)
    env = {"HF_HUB_OFFLINE": "1"}
    if role is Role.TEACHER:
        env["SGLANG_ENABLE_LOGPROB_CHUNK"] = "1"
        env["SGLANG_LOGPROB_CHUNK_SIZE"] = str(max(1, min(2048, _LOGITS_BYTES // (4 * vocab_size))))
    if device is Device.CPU:
        # Several busy OpenMP threads per process on shared cores wait for each other most of the time.
        env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        flags |= {
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--mem-fraction-static": "0.3",
            # Without it, the cache takes its share of all the memory that is free; one whole request always fits.
            "--max-total-tokens": str(max(16384, context_length or text.get("max_position_embeddings", 0))),
            "--max-running-requests": "64",
            # It polls at full speed otherwise, on cores that the trainer wants.
            "--sleep-on-idle": None,
            # Its English prompt is not in every vocabulary, and there is nothing to compile.
            "--skip-server-warmup": None,
        }
    given = {flag.split("=")[0] for flag in extra if flag.startswith("--")}
    arguments = [part for flag, value in flags.items() if flag not in given for part in (flag, value) if part]
    argv = (python, "-m", "sglang.launch_server", *arguments, *extra)
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    return ServerCommand(argv, env, host, port, vocab_size)


def find_python(given: Path | None) -> str:
    """The interpreter that runs the server: `given`, $BPDG_SGLANG_PYTHON, or this one where it has sglang.

    Raises:
        ValueError: the one that is named does not work, has no sglang or one that is too old, or there is none.
    """
    name = os.environ.get(PYTHON_VARIABLE)
    named = given or (Path(name) if name else None)
    if named is not None:
        python, source = named, "--python" if given else PYTHON_VARIABLE
        missing = f"{source}: {python} has no sglang"
    else:
        python, source = Path(sys.executable), "this Python"
        missing = f"{source} ({python}) has no sglang; name one that has, with --python or {PYTHON_VARIABLE}"
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ValueError(f"{source}: {python} is no program; give an interpreter, such as .venv-sglang/bin/python")
    found = _sglang_version(str(python))
    if found is None:
        raise ValueError(
            f"{missing}. tools/install_sglang_cpu.sh DIR makes a CPU installation, "
            "pip install 'megatron-bpdg[sglang]' a GPU one"
        )
    if Version(found) < MIN_SGLANG:
        raise ValueError(f"{source}: {python} has sglang {found}; {MIN_SGLANG} or newer is needed")
    # Not resolved: a virtual environment is known by the name of its link.
    return str(python.absolute())


def as_hf(checkpoint: Path, export: Path | None, console: Console) -> Path:
    """A checkpoint as an HF directory: itself, or the export of a Megatron checkpoint, made unless it is there.

    Args:
        checkpoint: HF directory, or Megatron checkpoint with a tracker or one step of it.
        export: where to; None: `served-ITERATION` in the run directory, or in the checkpoint where it is of no run.
        console: says what is written where.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: the export's directory holds something else.
        ValueError: `export` for an HF directory, or a checkpoint that cannot be converted.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} not found: expected an HF directory or a Megatron checkpoint")
    if not is_megatron(checkpoint):
        if export is not None:
            raise ValueError(f"--export is for Megatron checkpoints; {checkpoint} is an HF directory already")
        return checkpoint
    source = open_megatron(checkpoint)
    if export is None:
        folder = source.root.parent if source.root.name == "checkpoints" else source.root
        export = folder / f"served-{'release' if source.iteration is None else source.iteration}"
    record = export / EXPORT_RECORD
    files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.files)]
    if record.is_file() and json.loads(record.read_text()) == files:
        console.print(f"exported before: {export}", soft_wrap=True)
        return export
    if export.exists() and not record.is_file():
        raise FileExistsError(
            f"{export} exists and is no export of `bpdg serve`; delete it, or choose another --export"
        )
    console.print(f"exporting {checkpoint} to {export}", soft_wrap=True)
    megatron_to_hf(checkpoint, export, options=Options(overwrite=True), console=console)
    write_text(record, json.dumps(files))
    return export


def serve(command: ServerCommand, log: Path, deadline_s: float, console: Console) -> None:
    """Run a server until a signal interrupts or it ends; its facts are printed once it is healthy.

    Args:
        log: its output.
        deadline_s: seconds that it has to become healthy.

    Raises:
        ServerDied: the server ended by itself.
    """

    def report(seconds: float, line: str) -> None:
        console.print(Text(f"starting for {seconds:.0f} s: {line}"), soft_wrap=True)

    console.print(f"log: {log}", soft_wrap=True)
    with RunningServer(command, log, deadline_s=deadline_s, progress=report) as server:
        facts = asyncio.run(ask(server.url, command.api_key, server_facts))
        console.print(
            f"ready: {server.url} serves {facts.model}, {facts.dtype}, vocabulary {command.vocab_size}, context "
            f"{facts.context_length}, weights {facts.weight_version!r}, SGLang {facts.sglang}; Ctrl-C stops it",
            soft_wrap=True,
            highlight=False,
        )
        server.wait()


def _read_config(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as it is, as SGLang serves more families than the trainer knows; and the part about the text model.

    They are the same but for models that also read images.
    """
    file = model / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: expected an HF model directory with a config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        text["vocab_size"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no model's config: {type(error).__name__}: {error}") from error
    return config, text


def _sglang_version(python: str) -> str | None:
    """Version that an interpreter has, without importing it, which takes long."""
    program = "from importlib.metadata import version; print(version('sglang'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
