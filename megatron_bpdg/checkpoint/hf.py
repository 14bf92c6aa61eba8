"""HF checkpoints: safetensors, read one tensor or slice at a time, written as a stream."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bpdg.checkpoint.directory import read_source
from megatron_bpdg.checkpoint.files import copy_sidecars
from megatron_bpdg.checkpoint.mapping import HF_EMBEDDING, LM_HEAD, MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.patterns import Shape
from megatron_bpdg.data.batch import up_to
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.tracking.files import write_text

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFCheckpoint:
    """An HF model directory with safetensors weights, sharded or in one file. Tensors are read when asked for.

    Files are mapped, and a tensor may be a view of its file: it is not to be written to, nor the file while it is used.

    Attributes:
        path: the directory.
        config: see `read_hf_config`.
        files: data files.
        shapes: name -> shape of every tensor.
        dtypes: name -> dtype of every tensor.

    Raises:
        FileNotFoundError: no directory, config, weights, or a shard that the index names.
        ValueError: unsupported config or dtype; a file that is not safetensors.
        MappingError: index and shards disagree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory: expected an HF model directory")
        self.config = read_hf_config(self.path)
        self._files = self._locate()
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, file in self._files.items():
            tensor = file.get_slice(name)
            self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()]

    def _locate(self) -> dict[str, Any]:
        """Every tensor's opened file, from the index or the single file."""
        weight_map: dict[str, str] | None = None
        if (self.path / INDEX_FILE).is_file():
            weight_map = _read_index(self.path / INDEX_FILE)
            files = sorted(set(weight_map.values()))
            if absent := [name for name in files if not (self.path / name).is_file()]:
                raise FileNotFoundError(f"{self.path}: {INDEX_FILE} names files that are absent: {', '.join(absent)}")
        elif (self.path / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            bins = any(self.path.glob("*.bin"))
            hint = "; convert the .bin weights with transformers' save_pretrained first" if bins else ""
            raise FileNotFoundError(f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}{hint}")
        self.files = [self.path / file for file in files]
        located: dict[str, Any] = {}
        file_of: dict[str, str] = {}
        problems = []
        for file in files:
            for name, opened in _open(self.path / file).items():
                if name in located:
                    problems.append(f"{name} is in both {file_of[name]} and {file}")
                elif weight_map is not None and weight_map.get(name) != file:
                    problems.append(f"{name} is in {file}; {INDEX_FILE} says {weight_map.get(name)}")
                located[name], file_of[name] = opened, file
        problems += [f"{name} is not in {file}" for name, file in (weight_map or {}).items() if name not in located]
        if problems:
            raise MappingError(f"{self.path}: index and shards disagree\n  " + "\n  ".join(problems))
        return located

    @property
    def has_lm_head(self) -> bool:
        """Whether `lm_head.weight` is stored; some tied releases carry it."""
        return LM_HEAD in self.shapes

    @property
    def stored_sizes(self) -> list[tuple[torch.dtype, int]]:
        """dtype and bytes of every tensor."""
        return [(dtype, math.prod(self.shapes[name]) * dtype.itemsize) for name, dtype in self.dtypes.items()]

    def read(self, name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        """A tensor, or ``[start, start + length)`` of its dimension `dim`, from disk. A `patterns.TensorReader`."""
        if dim is None:
            return self._files[name].get_tensor(name)
        assert length is not None
        return self._files[name].get_slice(name)[(*[slice(None)] * dim, slice(start, start + length))]

    @cached_property
    def mapping(self) -> ModelMapping:
        """The model's weight table, for the true vocabulary."""
        return mapping_for(self.config)

    def check(self) -> None:
        """Raise MappingError unless the tensors are exactly those the config asks for.

        A tied model's `lm_head.weight` may be present if it equals the embedding.
        """
        self.mapping.check_hf(self.shapes, str(self.path))
        if self.mapping.tied and self.has_lm_head and not same_bytes(self.read(LM_HEAD), self.read(HF_EMBEDDING)):
            raise MappingError(
                f"{self.path}: config.json says tie_word_embeddings true, but {LM_HEAD} differs from "
                f"{HF_EMBEDDING}; set tie_word_embeddings false or remove {LM_HEAD}"
            )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (NaNs compare by their bits, and -0.0 differs from 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _read_index(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not an index: expected JSON with a weight_map of tensor names to files") from error


def _open(file: Path) -> dict[str, Any]:
    """Name -> the opened file, whose header describes it exactly: no tensors that overlap or are not supported."""
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated, damaged or not a safetensors file: {error}") from error
    names = opened.keys()
    dtypes = {name: opened.get_slice(name).get_dtype() for name in names}
    if quantised := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
        raise ValueError(
            f"{file}: unsupported dtype {', '.join(sorted({dtypes[name] for name in quantised}))} of "
            f"{', '.join(quantised)}; supported: {', '.join(DTYPES)} (quantised releases have a bf16 original)"
        )
    return dict.fromkeys(names, opened)


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
        ValueError: a dtype that is not written, a repeated name.
    """
    names: set[str] = set()
    for tensor in plan:
        if tensor.name in names:
            raise ValueError(f"{tensor.name} is planned twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{tensor.name}: dtype {tensor.dtype} cannot be written")
        names.add(tensor.name)
    files = list(up_to(plan, (tensor.num_bytes for tensor in plan), max_shard_size))
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


def write_hf_common(directory: Path, shards: Sequence[Shard], hf_folder: Path, dtype: torch.dtype | None) -> None:
    """Write what surrounds the files of tensors: the index of several, and config and tokenizer.

    Args:
        directory: the new HF directory.
        shards: its files.
        hf_folder: where config and tokenizer come from.
        dtype: what the config says of the weights; None: as it is.
    """
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    copy_sidecars(hf_folder, directory)
    if dtype is not None:
        set_config_dtype(directory / "config.json", dtype)


def emits_lm_head(hf_folder: Path) -> bool:
    """Whether a tied model's HF form should repeat its embedding as `lm_head.weight`, as its source did."""
    source = read_source(hf_folder)
    if source is not None:
        return source.has_lm_head
    has_weights = any(hf_folder.glob("*.safetensors"))
    return has_weights and HFCheckpoint(hf_folder).has_lm_head


def hf_plan(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], *, lm_head: bool) -> list[TensorPlan]:
    """What `ModelMapping.hf_parts` gives over all weights, by canonical key's dtype."""
    return [
        TensorPlan(name, shape, dtypes[weight.key])
        for weight in mapping.weights
        for name, shape in mapping.hf_shapes(weight, lm_head).items()
    ]


def set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    """Make config.json name the dtype that the weights now have, in the spelling the file uses."""
    config = json.loads(file.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(field) == (name := dtype_name(dtype)):
        return
    config[field] = name
    write_text(file, json.dumps(config, indent=2) + "\n")


def write_fresh_checkpoint(config: Path, tokenizer: Path, target: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write HF's own initialisation of a model under a seed, with its tokenizer: every layout starts from it.

    Args:
        config: HF config.json, or a directory with one.
        tokenizer: HF tokenizer directory.
        target: new HF directory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # seconds, and only needed here
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config, local_files_only=True), dtype=dtype)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(target)
