"""`bpdg doctor`: what this installation can do."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# distribution name -> (import name, what it is for)
_REQUIRED = {
    "torch": ("torch", "everything"),
    "megatron-core": ("megatron.core", "the trainer; >=0.16,<0.20; from 0.18 on CPU also needs triton"),
    "transformers": ("transformers", "tokenizers, the embedded sampler"),
    "safetensors": ("safetensors", "HF checkpoints"),
    "math-verify": ("math_verify", "the default grader"),
    "psutil": ("psutil", "Megatron-Core's checkpoint writer"),
}
_OPTIONAL = {
    "transformer-engine": ("transformer_engine", "[te]: fused layers on GPU"),
    "apex": ("amp_C", "fused Adam; built from NVIDIA's sources, not the PyPI package of that name"),
    "sglang": ("sglang", "[sglang]: rollout and teacher servers"),
    "nvidia-modelopt": ("modelopt", "[modelopt]"),
    "wandb": ("wandb", "[wandb]: metrics"),
    "tensorboard": ("tensorboard", "metrics"),
}


def diagnose(console: Console) -> bool:
    """Print a table; returns whether everything required is there."""
    import torch

    healthy = True
    table = Table("", "found", "for", title="bpdg doctor", title_justify="left")
    table.add_row("python", sys.version.split()[0], "3.11 or newer")
    for names, required in ((_REQUIRED, True), (_OPTIONAL, False)):
        for name, (module, purpose) in names.items():
            found = _version(name, module)
            healthy &= found is not None or not required
            if name == "megatron-core" and found and not Version("0.16") <= Version(found) < Version("0.20"):
                healthy, found = False, f"[red]{found}: not supported[/]"
            table.add_row(name, found or ("[red]missing[/]" if required else "not installed"), escape(purpose))
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        table.add_row("device", device, "NCCL")
    else:
        table.add_row("device", f"CPU, {os.cpu_count()} cores", "gloo, through the CPU platform")
    problem = _run_tiny_model()
    healthy &= problem is None
    table.add_row("a tiny Qwen3 on Megatron-Core", f"[red]{escape(problem)}[/]" if problem else "runs", "training")
    console.print(table)
    return healthy


def _version(name: str, module: str) -> str | None:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "importable"


def _run_tiny_model() -> str | None:
    """Forward and backward of a two-layer model; the error where it fails."""
    import torch

    from megatron_bpdg.config.schema import Layout
    from megatron_bpdg.models.qwen3 import Qwen3Shape, build_model
    from megatron_bpdg.parallel.platform import default_device
    from megatron_bpdg.parallel.world import world

    shape = Qwen3Shape(2, 32, 64, 4, 2, tie_word_embeddings=True, head_dim=8, vocab_size=16)
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
