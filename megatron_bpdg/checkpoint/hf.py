"""Reading HF checkpoints: config.json and safetensors, one tensor or slice at a time."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_bpdg.checkpoint.mapping import HF_EMBEDDING, LM_HEAD, MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.patterns import Shape

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100_000_000  # the format's own limit
_COMPARE_ROWS = 8192


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a Qwen3 dense model, as transformers 4 or 5 write it.

    Args:
        path: model directory or the file itself.

    Returns:
        All fields of the file, with `rope_theta`, `dtype` (a string, or None), `head_dim` and `tie_word_embeddings`
        filled in whichever way the file spells them.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: listing every missing field and every feature that is not supported.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: expected an HF model directory with a config.json")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if config.get("rope_theta") is None:
        config["rope_theta"] = rope.get("rope_theta")
    dtype = config.get("dtype") or config.get("torch_dtype")
    config["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    if config.get("head_dim") is None:
        config["head_dim"] = 128  # transformers' default for Qwen3
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    if problems := _config_problems(config):
        raise ValueError(f"{file}: {'; '.join(problems)}")
    return config


def _config_problems(config: dict[str, Any]) -> list[str]:
    if config.get("model_type") != "qwen3":
        return [f"model_type {config.get('model_type')!r} is not supported (only 'qwen3', dense)"]
    required = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
    )
    problems = [f"{name} is missing" for name in required if config.get(name) is None]
    if config.get("attention_bias"):
        problems.append("attention_bias true is not supported (Qwen3 has no attention bias)")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r} is not supported (only 'silu')")
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"{name} of type {kind!r} is not supported (only none or 'default')")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"{name}.partial_rotary_factor {rope['partial_rotary_factor']} is not supported (only 1)")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        problems.append("sliding-window attention is not supported (set use_sliding_window false)")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised checkpoints are not supported; use the bf16 or fp32 release")
    return problems


class HFCheckpoint:
    """An HF model directory with safetensors weights, sharded or in one file. Tensors are read when asked for.

    Attributes:
        path: the directory.
        config: see `read_hf_config`.
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
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files = self._locate()
        self._handles: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        """Name -> file, from the index or the single file, with shapes and dtypes read from the headers."""
        weight_map: dict[str, str] | None = None
        if (self.path / INDEX_FILE).is_file():
            weight_map = json.loads((self.path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            if absent := [name for name in files if not (self.path / name).is_file()]:
                raise FileNotFoundError(f"{self.path}: {INDEX_FILE} names files that are absent: {', '.join(absent)}")
        elif (self.path / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            hint = "; convert the .bin weights with transformers' save_pretrained first" if self._has_bin() else ""
            raise FileNotFoundError(f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}{hint}")
        located: dict[str, str] = {}
        problems = []
        for file in files:
            for name, entry in _read_header(self.path / file).items():
                if name in located:
                    problems.append(f"{name} is in both {located[name]} and {file}")
                elif weight_map is not None and weight_map.get(name) != file:
                    problems.append(f"{name} is in {file}; {INDEX_FILE} says {weight_map.get(name)}")
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{self.path / file}: {name} has unsupported dtype {entry['dtype']}")
                located[name] = file
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = DTYPES[entry["dtype"]]
        problems += [f"{name} is not in {file}" for name, file in (weight_map or {}).items() if name not in located]
        if problems:
            raise MappingError(f"{self.path}: index and shards disagree\n  " + "\n  ".join(problems))
        return located

    def _has_bin(self) -> bool:
        return any(self.path.glob("*.bin"))

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding, from the config."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def has_lm_head(self) -> bool:
        """Whether `lm_head.weight` is stored; some tied releases carry it."""
        return LM_HEAD in self.shapes

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.dtypes[name].itemsize * _numel(shape) for name, shape in self.shapes.items())

    def read(self, name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        """A tensor, or ``[start, start + length)`` of its dimension `dim`, from disk. A `patterns.TensorReader`."""
        file = self._files[name]
        if file not in self._handles:
            self._handles[file] = safe_open(self.path / file, framework="pt")
        handle = self._handles[file]
        if dim is None:
            return handle.get_tensor(name)
        assert length is not None
        if length == 0:
            shape = list(self.shapes[name])
            shape[dim] = 0
            return torch.empty(shape, dtype=self.dtypes[name])
        index = tuple(slice(start, start + length) if axis == dim else slice(None) for axis in range(dim + 1))
        return handle.get_slice(name)[index]

    @cached_property
    def mapping(self) -> ModelMapping:
        """The model's weight table, for the true vocabulary."""
        return mapping_for(self.config)

    def check(self) -> None:
        """Raise MappingError unless the tensors are exactly those the config asks for.

        A tied model's `lm_head.weight` may be present if it equals the embedding.
        """
        self.mapping.check_hf(self.shapes, str(self.path))
        if not (self.tied and self.has_lm_head):
            return
        rows = self.shapes[LM_HEAD][0]
        for start in range(0, rows, _COMPARE_ROWS):
            length = min(_COMPARE_ROWS, rows - start)
            head, embedding = (self.read(name, 0, start, length) for name in (LM_HEAD, HF_EMBEDDING))
            if not same_bytes(head, embedding):
                raise MappingError(
                    f"{self.path}: config.json says tie_word_embeddings true, but {LM_HEAD} differs from "
                    f"{HF_EMBEDDING}; set tie_word_embeddings false or remove {LM_HEAD}"
                )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (NaNs compare by their bits, and -0.0 differs from 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, file.stat().st_size):
            raise ValueError(f"{file} is not a safetensors file (or is truncated)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size < 8 + length + end:
        raise ValueError(f"{file} is truncated: {file.stat().st_size} bytes, its header asks for {8 + length + end}")
    return dict(header)
