"""Writing HF checkpoints as a stream: one safetensors file after the other, each tensor straight to its place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.directory import read_source
from megatron_bpdg.checkpoint.files import in_files
from megatron_bpdg.checkpoint.hf import DTYPES, INDEX_FILE, SINGLE_FILE, HFCheckpoint
from megatron_bpdg.checkpoint.mapping import LM_HEAD, MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Shape, Weight
from megatron_bpdg.tracking.files import write_text

MAX_SHARD_SIZE = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file that is going to be written.

    Attributes:
        file: its name.
        tensors: what it holds, in the order in which they come.
    """

    file: str
    tensors: Sequence[TensorPlan]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's header and each tensor's absolute offset: wide dtypes first, so that all stay aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        position = 0
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize):
            offsets[tensor.name] = position
            end = position + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}


def plan_shards(plan: Sequence[TensorPlan], max_shard_size: int = MAX_SHARD_SIZE) -> list[Shard]:
    """Spread tensors over files of at most `max_shard_size` bytes of tensors; a larger one has a file of its own.

    Raises:
        ValueError: a dtype that is not written, a repeated name, a `max_shard_size` below 1.
    """
    names: set[str] = set()
    for tensor in plan:
        if tensor.name in names:
            raise ValueError(f"{tensor.name} is planned twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{tensor.name}: dtype {tensor.dtype} cannot be written")
        names.add(tensor.name)
    files = in_files(plan, [tensor.num_bytes for tensor in plan], max_shard_size)
    if len(files) == 1:
        return [Shard(SINGLE_FILE, files[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(files):05d}.safetensors", tensors) for number, tensors in enumerate(files, 1)
    ]


def write_shard(directory: Path, shard: Shard, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file.

    Args:
        directory: an existing directory.
        shard: the file.
        tensors: takes as many as it holds, in its order, on any device.

    Raises:
        MappingError: a tensor that is not the one planned, or none.
    """
    header, offsets = shard.layout()
    with (directory / shard.file).open("wb") as stream:
        stream.write(header)
        for planned in shard.tensors:
            name, tensor = next(tensors, ("", torch.empty(0)))
            found = TensorPlan(name, tuple(tensor.shape), tensor.dtype)
            if found != planned:
                raise MappingError(f"{shard.file}: {found if name else 'nothing'} came in place of {planned}")
            stream.seek(offsets[planned.name])
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is asked for
        stream.flush()
        os.fsync(stream.fileno())


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several files; one file needs none."""
    if len(shards) == 1:
        return
    total = sum(shard.num_bytes for shard in shards)
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def emits_lm_head(hf_folder: Path) -> bool:
    """Whether a tied model's HF form should repeat its embedding as `lm_head.weight`, as its source did."""
    source = read_source(hf_folder)
    if source is not None:
        return source.has_lm_head
    has_weights = any(hf_folder.glob("*.safetensors"))
    return has_weights and HFCheckpoint(hf_folder).has_lm_head


def hf_plan(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], *, lm_head: bool) -> list[TensorPlan]:
    """What `hf_parts` will yield over all weights, by canonical key's dtype."""
    plan = []
    for weight in mapping.weights:
        plan += [
            TensorPlan(name, shape, dtypes[weight.key])
            for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
        ]
        if mapping.tied and lm_head and weight is mapping.embedding:
            plan.append(TensorPlan(LM_HEAD, weight.hf_shapes[0], dtypes[weight.key]))
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
