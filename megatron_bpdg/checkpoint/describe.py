"""What a checkpoint holds, from its headers and metadata alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megatron_bpdg.checkpoint.hf import HFCheckpoint, dtype_name
from megatron_bpdg.checkpoint.legacy import LegacyCheckpoint
from megatron_bpdg.checkpoint.mapping import ModelMapping, mapping_for
from megatron_bpdg.checkpoint.source import is_megatron, open_megatron
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint
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
    if is_megatron(path):
        return _describe_megatron(open_megatron(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    hf = HFCheckpoint(path)
    return {
        "format": "hf",
        "path": str(hf.path),
        "iteration": None,
        "layout": {"shards": len(hf.files), "lm_head": "stored" if hf.has_lm_head else "the embedding"},
        **_data(hf.files, hf.stored_sizes),
        **_of_config(hf.config, lambda mapping: hf.check()),
    }


def _describe_megatron(checkpoint: LegacyCheckpoint | TorchDistCheckpoint) -> dict[str, Any]:
    layout: dict[str, Any]
    if isinstance(checkpoint, LegacyCheckpoint):
        form, layout = "mp_rank", {"ranks": checkpoint.sizes}
    else:
        form, layout = "torch_dist", {"layers": "stacked" if checkpoint.stacked else "one key per layer"}
    saved = {name: checkpoint.arguments.get(field) for name, field in _SAVED_AT.items()}
    layout["saved_at"] = {name: size for name, size in saved.items() if isinstance(size, int)}
    description = {
        "format": form,
        "path": str(checkpoint.directory),
        "iteration": "release" if checkpoint.iteration is None else checkpoint.iteration,
        "layout": layout | {"optimizer": checkpoint.has_optimizer},
        **_data(checkpoint.files, checkpoint.stored_sizes),
    }
    try:
        config = hf_config_of(checkpoint.hf_folder, checkpoint.root)
    except FileNotFoundError as error:
        return description | {"parameters": None, "model": None, "complete": str(error)}
    return description | _of_config(config, checkpoint.check)


def _of_config(config: Mapping[str, Any], check: Callable[[ModelMapping], None]) -> dict[str, Any]:
    mapping = mapping_for(config)
    complete: bool | str = True
    try:
        check(mapping)
    except ValueError as error:
        complete = str(error)
    return {
        "parameters": mapping.num_parameters,
        "model": {name: config[name] for name in _MODEL_FIELDS if config.get(name) is not None},
        "complete": complete,
    }


def _data(files: Sequence[Path], sizes: Iterable[tuple[torch.dtype, int]]) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for dtype, num_bytes in sizes:
        entry = dtypes.setdefault(dtype_name(dtype), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += num_bytes
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": sum(entry["tensors"] for entry in dtypes.values()),
        "dtypes": dtypes,
    }


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
