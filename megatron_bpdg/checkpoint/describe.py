"""What a checkpoint holds, from its headers and metadata alone."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.legacy import LegacyCheckpoint, is_legacy
from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.checkpoint.raw import load_foreign
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint, is_torch_dist
from megatron_bpdg.models.hf_config import hf_config_of

_MODEL_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "rope_theta",
    "rope_scaling",
)
# Megatron-LM's names of the sizes a checkpoint was saved at.
_SAVED_AT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
}


def describe(path: Path) -> dict[str, Any]:
    """Describe an HF directory, torch_dist or mp_rank checkpoint; plain values, fit for JSON.

    Returns:
        `format`, `path`, `iteration` (None: HF; "release", or a number), `layout`, `files`, `bytes` (of data files),
        `tensors` and `dtypes` (tensors and bytes of each) as they are stored, `parameters` (None without a config: a
        tied embedding counts once, padded vocabulary rows and repeated copies do not), `model` (None without a
        config) and `complete` (True, or what is wrong with it).

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint at `path`, or it is not readable.
    """
    if is_legacy(path):
        return _describe_legacy(LegacyCheckpoint(path))
    if is_torch_dist(path):
        return _describe_torch_dist(TorchDistCheckpoint(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return _describe_hf(HFCheckpoint(path))


def _describe_hf(hf: HFCheckpoint) -> dict[str, Any]:
    mapping = hf.mapping
    sizes = [(dtype, hf.tensor_bytes(name)) for name, dtype in hf.dtypes.items()]
    files = len(hf.files)
    return {
        "format": "hf",
        "path": str(hf.path),
        "iteration": None,
        "layout": {"shards": files, "lm_head": "stored" if hf.has_lm_head else "the embedding"},
        **_data(hf.files, sizes),
        "parameters": mapping.num_parameters,
        "model": _model(hf.config),
        "complete": _attempt(hf.check),
    }


def _describe_torch_dist(checkpoint: TorchDistCheckpoint) -> dict[str, Any]:
    sizes = [(dtype, math.prod(checkpoint.shapes[key]) * dtype.itemsize) for key, dtype in checkpoint.dtypes.items()]
    return {
        "format": "torch_dist",
        "path": str(checkpoint.directory),
        "iteration": "release" if checkpoint.iteration is None else checkpoint.iteration,
        "layout": {
            "layers": "stacked" if checkpoint.stacked else "one key per layer",
            "saved_at": _saved_at(_common_arguments(checkpoint.directory / "common.pt")),
            "optimizer": checkpoint.has_optimizer,
        },
        **_data(checkpoint.files, sizes),
        **_with_config(checkpoint, checkpoint.hf_folder),
    }


def _describe_legacy(checkpoint: LegacyCheckpoint) -> dict[str, Any]:
    return {
        "format": "mp_rank",
        "path": str(checkpoint.directory),
        "iteration": "release" if checkpoint.iteration is None else checkpoint.iteration,
        "layout": {
            "ranks": checkpoint.sizes,
            "saved_at": _saved_at(checkpoint.arguments),
            "optimizer": checkpoint.has_optimizer,
        },
        **_data(checkpoint.files, checkpoint.stored_sizes),
        **_with_config(checkpoint, checkpoint.hf_folder),
    }


def _data(files: Iterable[Path], sizes: Iterable[tuple[torch.dtype, int]]) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for dtype, num_bytes in sizes:
        entry = dtypes.setdefault(str(dtype).removeprefix("torch."), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += num_bytes
    files = list(files)
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": sum(entry["tensors"] for entry in dtypes.values()),
        "dtypes": dtypes,
    }


def _with_config(checkpoint: TorchDistCheckpoint | LegacyCheckpoint, folder: Path | None) -> dict[str, Any]:
    try:
        config = hf_config_of(folder, checkpoint.root)
    except FileNotFoundError as error:
        return {"parameters": None, "model": None, "complete": str(error)}
    mapping = mapping_for(config)
    return {
        "parameters": mapping.num_parameters,
        "model": _model(config),
        "complete": _attempt(lambda: checkpoint.check(mapping)),
    }


def _attempt(check: Callable[[], None]) -> bool | str:
    try:
        check()
    except ValueError as error:
        return str(error)
    return True


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _MODEL_FIELDS if config.get(name) is not None}


def _common_arguments(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    common = load_foreign(file)
    arguments = common.get("args") if isinstance(common, dict) else None
    return vars(arguments) if isinstance(arguments, Namespace) else {}


def _saved_at(arguments: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, field in _SAVED_AT.items() if isinstance(value := arguments.get(field), int)}


def description_table(description: Mapping[str, Any]) -> Table:
    """The description for a terminal."""
    table = Table(title=description["path"], show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    iteration, parameters = description["iteration"], description["parameters"]
    table.add_row("format", description["format"])
    table.add_row("iteration", "-" if iteration is None else str(iteration))
    table.add_row("parameters", "unknown (no config)" if parameters is None else f"{parameters:,}")
    table.add_row("data", f"{description['bytes'] / 1e9:.3f} GB in {description['files']} file(s)")
    for dtype, entry in description["dtypes"].items():
        table.add_row(dtype, f"{entry['tensors']:,} tensors, {entry['bytes'] / 1e9:.3f} GB")
    table.add_row("layout", _flat(description["layout"]))
    if description["model"]:
        table.add_row("model", _flat(description["model"]))
    complete = description["complete"]
    table.add_row("complete", "yes: every tensor of the config, in its shape" if complete is True else str(complete))
    return table


def _flat(values: Mapping[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        text = _flat(value).replace("\n", ", ") if isinstance(value, dict) else str(value)
        parts.append(f"{name}: {text or '-'}")
    return "\n".join(parts)
