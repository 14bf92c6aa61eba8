"""Whole conversions with progress, and the comparison that proves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_bpdg.checkpoint.files import check_disk_space, check_free, copy_sidecars, staged_directory, write_text
from megatron_bpdg.checkpoint.hf import HFCheckpoint, read_hf_config, same_bytes
from megatron_bpdg.checkpoint.hf_writer import HFWriter, TensorPlan
from megatron_bpdg.checkpoint.mapping import LM_HEAD, MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.torch_dist import (
    Source,
    TorchDistCheckpoint,
    read_source,
)
from megatron_bpdg.checkpoint.torch_dist_writer import write_hf_folder, write_torch_dist

# Headers, metadata and tokenizer files on top of the tensors.
_DISK_MARGIN = 64 * 2**20


def compare_hf(a: str | Path, b: str | Path) -> list[str]:
    """Every difference between two HF checkpoints in names, shapes, dtypes and bytes; empty where there is none.

    How tensors are spread over files does not count.
    """
    left, right = HFCheckpoint(a), HFCheckpoint(b)
    differences = [f"{name}: only in {left.path}" for name in left.names if name not in right.shapes]
    differences += [f"{name}: only in {right.path}" for name in right.names if name not in left.shapes]
    for name in left.names:
        if name not in right.shapes:
            continue
        if left.shapes[name] != right.shapes[name]:
            differences.append(f"{name}: shape {left.shapes[name]} and {right.shapes[name]}")
        elif left.dtypes[name] != right.dtypes[name]:
            differences.append(f"{name}: dtype {left.dtypes[name]} and {right.dtypes[name]}")
        elif not same_bytes(one := left.read(name), two := right.read(name)):
            width = one.element_size()
            unequal = one.contiguous().flatten().view(torch.uint8) != two.contiguous().flatten().view(torch.uint8)
            count = int(unequal.view(-1, width).any(1).sum())
            differences.append(f"{name}: {count} of {one.numel()} elements differ")
    return differences


def hf_to_megatron(
    src: str | Path, dst: str | Path, *, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Convert an HF model directory to a torch_dist checkpoint, loadable at any tensor and pipeline parallel size.

    Holds one layer's tensor in memory at a time. `dst` appears only when complete.

    Args:
        src: HF Qwen3 directory with safetensors weights.
        dst: new checkpoint directory.
        overwrite: replace an existing `dst`.
        console: where the progress bar goes; None: no progress bar.

    Returns:
        `dst`.

    Raises:
        FileNotFoundError: `src` or a file of it is missing.
        FileExistsError: `dst` exists and `overwrite` is false.
        MappingError: the tensors are not those the config asks for; lists all of them.
        OSError: not enough disk space.
        ValueError: a model or feature that is not supported.
    """
    source, dst = HFCheckpoint(src), Path(dst)
    check_free(dst, overwrite=overwrite)
    source.check()
    mapping = source.mapping
    dtypes = {weight.key: _common_dtype(weight, source.dtypes) for weight in mapping.weights}
    total = sum(_num_bytes(weight, dtypes[weight.key]) for weight in mapping.weights)
    check_disk_space(dst, total + _DISK_MARGIN)
    with staged_directory(dst, overwrite=overwrite) as staging, _progress(console, "HF to Megatron", total) as advance:

        def make(weight: Weight) -> Tensor:
            tensor = weight.hf_to_megatron([source.read(name) for name in weight.hf_names])
            advance(tensor.nbytes)
            return tensor

        write_torch_dist(staging, mapping, source.config, dtypes, make)
        dtype = str(dtypes[mapping.embedding.key]).removeprefix("torch.")
        write_hf_folder(staging, source.path, Source(source.has_lm_head, source.config["vocab_size"], dtype))
    return dst


def megatron_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    hf_source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Convert a torch_dist checkpoint (this program's or Megatron's own, any layout) to an HF model directory.

    Args:
        src: checkpoint directory with a tracker, or one step's directory.
        dst: new HF directory.
        hf_source: HF directory with config.json and tokenizer; None: the checkpoint's own hf folder.
        dtype: cast to this; None: keep each tensor's dtype, byte for byte.
        max_shard_size: bytes per safetensors file.
        overwrite: replace an existing `dst`.
        console: where the progress bar goes; None: no progress bar.

    Returns:
        `dst`.

    Raises:
        As `hf_to_megatron`.
    """
    source, dst = TorchDistCheckpoint(src), Path(dst)
    check_free(dst, overwrite=overwrite)
    folder = source.hf_folder if hf_source is None else Path(hf_source)
    if folder is None:
        raise FileNotFoundError(
            f"{source.root} has no hf/config.json (it was not written by this program); give the HF model directory "
            "whose config and tokenizer belong to it (--hf-source)"
        )
    config = read_hf_config(folder)
    mapping = mapping_for(config)
    mapping.check_megatron(source.shapes, str(source.directory))
    lm_head = emits_lm_head(folder)
    dtypes = {weight.key: dtype or source.dtypes[weight.key] for weight in mapping.weights}
    plan = hf_plan(mapping, dtypes, lm_head=lm_head)
    total = sum(tensor.num_bytes for tensor in plan)
    check_disk_space(dst, total + _DISK_MARGIN)
    with (
        staged_directory(dst, overwrite=overwrite) as staging,
        _progress(console, "Megatron to HF", total) as advance,
        HFWriter(staging, plan, max_shard_size) as writer,
    ):
        for weight in mapping.weights:
            full = source.read(weight.key).to(dtypes[weight.key])
            for name, tensor in hf_parts(mapping, weight, full, lm_head=lm_head):
                writer.add(name, tensor)
                advance(tensor.nbytes)
        copy_sidecars(folder, staging)
        if dtype is not None:
            set_config_dtype(staging / "config.json", dtype)
    return dst


def emits_lm_head(hf_folder: Path) -> bool:
    """Whether a tied model's HF form should repeat its embedding as `lm_head.weight`, as its source did."""
    source = read_source(hf_folder)
    if source is not None:
        return source.has_lm_head
    has_weights = any(hf_folder.glob("*.safetensors"))
    return has_weights and HFCheckpoint(hf_folder).has_lm_head


def hf_plan(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], *, lm_head: bool) -> list[TensorPlan]:
    """What `hf_parts` will yield over all weights, by canonical key's dtype."""
    plan = [
        TensorPlan(name, shape, dtypes[weight.key])
        for weight in mapping.weights
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    ]
    if mapping.tied and lm_head:
        plan.append(TensorPlan(LM_HEAD, mapping.embedding.hf_shapes[0], dtypes[mapping.embedding.key]))
    return plan


def hf_parts(mapping: ModelMapping, weight: Weight, full: Tensor, *, lm_head: bool) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of one full Megatron tensor; for a tied model with `lm_head`, the embedding under both names."""
    for name, tensor in weight.megatron_to_hf(full).items():
        yield name, tensor
        if mapping.tied and lm_head and weight is mapping.embedding:
            yield LM_HEAD, tensor


def set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    """Make config.json name the dtype that the weights now have, in the spelling the file uses."""
    config = json.loads(file.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(field) == (name := str(dtype).removeprefix("torch.")):
        return
    config[field] = name
    write_text(file, json.dumps(config, indent=2) + "\n")


def _num_bytes(weight: Weight, dtype: torch.dtype) -> int:
    return torch.Size(weight.megatron_shape).numel() * dtype.itemsize


def _common_dtype(weight: Weight, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """dtype of the HF parts of one Megatron tensor, which must agree: joining would silently promote."""
    found = {name: dtypes[name] for name in weight.hf_names}
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise MappingError(f"{weight.key} is made of tensors of different dtypes: {listing}")
    return found[weight.hf_names[0]]


@contextmanager
def _progress(console: Console | None, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes with rate and remaining time; yields the function that advances it."""
    if console is None:
        yield lambda num_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
