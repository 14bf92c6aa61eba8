"""`bpdg doctor`: what this installation can do, and whether servers are fit for it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# (distribution, import name, required, what it is for)
_PACKAGES = (
    ("torch", "torch", True, "everything"),
    ("megatron-core", "megatron.core", True, "the trainer; >=0.16,<0.20; from 0.18 on CPU also needs triton"),
    ("transformers", "transformers", True, "tokenizers, the embedded sampler"),
    ("safetensors", "safetensors", True, "HF checkpoints"),
    ("math-verify", "math_verify", True, "the default grader"),
    ("psutil", "psutil", True, "Megatron-Core's checkpoint writer"),
    ("transformer-engine", "transformer_engine", False, "[te]: fused layers on GPU"),
    ("apex", "amp_C", False, "fused Adam; built from NVIDIA's sources, not the PyPI package of that name"),
    ("sglang", "sglang", False, "[sglang]: rollout and teacher servers"),
    ("nvidia-modelopt", "modelopt", False, "[modelopt]"),
    ("wandb", "wandb", False, "[wandb]: metrics"),
    ("tensorboard", "tensorboard", False, "metrics"),
)


def doctor(
    server: Annotated[list[str] | None, typer.Option(help="URL of an SGLang server to ask; repeatable.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose tokenizer the servers must have: the student's.")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the servers' API key.")] = None,
) -> None:
    """Say what this installation, and servers, can do and what is missing."""
    if not server and (checkpoint is not None or api_key_env is not None):
        raise ValueError("--checkpoint and --api-key-env are about servers: name one with --server")
    healthy = _diagnose_installation()
    if server:
        healthy &= _diagnose_servers(server, checkpoint, api_key_env)
    if not healthy:
        raise typer.Exit(1)


def _diagnose_installation() -> bool:
    import torch

    healthy = True
    table = Table("", "found", "for", title="bpdg doctor", title_justify="left")
    table.add_row("python", sys.version.split()[0], "3.11 or newer")
    for name, module, required, purpose in _PACKAGES:
        found = "[red]missing[/]" if required else "not installed"
        if importlib.util.find_spec(module.split(".")[0]) is None:
            healthy &= not required
        else:
            try:
                found = version(name)
            except PackageNotFoundError:
                found = "importable"
            if name == "megatron-core" and not Version("0.16") <= Version(found) < Version("0.20"):
                healthy, found = False, f"[red]{found}: not supported[/]"
        table.add_row(name, found, escape(purpose))
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        table.add_row("device", device, "NCCL")
    else:
        table.add_row("device", f"CPU, {os.cpu_count()} cores", "gloo, through the CPU platform")
    problem = _run_tiny_model()
    table.add_row("a tiny Qwen3 on Megatron-Core", f"[red]{escape(problem)}[/]" if problem else "runs", "training")
    Console().print(table)
    return healthy and problem is None


def _diagnose_servers(servers: list[str], checkpoint: Path | None, api_key_env: str | None) -> bool:
    from megatron_bpdg.checkpoint.directory import hf_folder
    from megatron_bpdg.data.end_tokens import end_ids
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.serving.http.client import api_key

    key = api_key(api_key_env, "--api-key-env")
    tokenizer, vocab_size, ends = None, None, {}
    if checkpoint is not None:
        from transformers import AutoTokenizer

        folder = hf_folder(checkpoint)
        vocab_size = read_hf_config(folder)["vocab_size"]
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ends = {"responses end at": ", ".join(map(str, end_ids(folder, tokenizer, str(folder))))}
    healthy = True
    for url in servers:
        rows, problems = asyncio.run(_ask(url, key, tokenizer, vocab_size))
        table = Table("", "found", title=url, title_justify="left")
        for name, value in (rows | ends).items():
            table.add_row(name, escape(value))
        for problem in problems:
            table.add_row("[red]problem[/]", f"[red]{escape(problem)}[/]")
        Console().print(table)
        healthy &= not problems
    return healthy


async def _ask(url: str, key: str | None, tokenizer: Any, vocab_size: int | None) -> tuple[dict[str, str], list[str]]:
    """What a server says of itself, and what is wrong with it."""
    from megatron_bpdg.serving.http.client import Server, ServerError
    from megatron_bpdg.serving.sglang.facts import check_tokenizer, server_facts

    rows: dict[str, str] = {}
    problems = []
    async with Server(url, timeout_s=30.0, api_key=key) as server:
        try:
            facts = await server_facts(server)
            rows = {
                "SGLang": facts.sglang,
                "model": facts.model,
                "dtype": facts.dtype,
                "context": f"{facts.context_length} tokens",
                "room": f"{facts.token_limit} tokens of prompt and response"
                if facts.token_limit
                else "unknown: it does not say",
                "weights": facts.weight_version,
            }
            config = Path(facts.model) / "config.json"
            if config.is_file():
                served = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
                rows["vocabulary"] = str(served)
                if vocab_size is not None and served != vocab_size:
                    problems.append(f"its vocabulary has {served} ids, the checkpoint's {vocab_size}")
            else:
                rows["vocabulary"] = "unknown: its model cannot be read from here"
            if tokenizer is not None:
                await check_tokenizer(server, tokenizer)
                rows["tokenizer"] = "the checkpoint's"
            if not await server.healthy():
                # SGLang names no such state: its scheduler has answered just now, and yet nothing is generated.
                problems.append(
                    "it answers, but does not generate: paused by a trainer that died within a weight update (the next "
                    "run lets it go on, as does POST /continue_generation), or at fault: see its log"
                )
        except (ServerError, ValueError) as error:
            problems.append(str(error))
    return rows, problems


def _run_tiny_model() -> str | None:
    """Forward and backward of a two-layer model; the error where it fails."""
    import torch

    from megatron_bpdg.config.layout import Layout
    from megatron_bpdg.models.qwen3 import ModelShape, build_model
    from megatron_bpdg.parallel.platform import default_device
    from megatron_bpdg.parallel.world import world

    shape = ModelShape(2, 32, 64, 4, 2, tie_word_embeddings=True, head_dim=8, vocab_size=16)
    try:
        with world(Layout(), seed=0):
            model = build_model(shape, Layout(), torch.float32)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            ids_BS = torch.zeros(1, 8, dtype=torch.int64, device=default_device())
            model(ids_BS, torch.arange(8, device=ids_BS.device)[None], None).sum().backward()
    except (RuntimeError, TypeError, ValueError, ImportError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None
