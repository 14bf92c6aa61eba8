"""Reading HF checkpoints: safetensors, one tensor or slice at a time."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.config import read_hf_config as read_hf_config
from megatron_bpdg.checkpoint.mapping import HF_EMBEDDING, LM_HEAD, MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.raw import StoredTensor

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


class HFCheckpoint:
    """An HF model directory with safetensors weights, sharded or in one file. Tensors are read when asked for.

    Attributes:
        path: the directory.
        config: see `read_hf_config`.
        stored: name -> place of every tensor.
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
        self.stored = self._locate()
        self.shapes = {name: stored.shape for name, stored in self.stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self.stored.items()}

    def _locate(self) -> dict[str, StoredTensor]:
        """Every tensor's place, from the index or the single file, and the files' headers."""
        weight_map: dict[str, str] | None = None
        if (self.path / INDEX_FILE).is_file():
            weight_map = _read_index(self.path / INDEX_FILE)
            files = sorted(set(weight_map.values()))
            if absent := [name for name in files if not (self.path / name).is_file()]:
                raise FileNotFoundError(f"{self.path}: {INDEX_FILE} names files that are absent: {', '.join(absent)}")
        elif (self.path / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            hint = "; convert the .bin weights with transformers' save_pretrained first" if self._has_bin() else ""
            raise FileNotFoundError(f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}{hint}")
        located: dict[str, StoredTensor] = {}
        problems = []
        for file in files:
            for name, stored in _read_header(self.path / file).items():
                if name in located:
                    problems.append(f"{name} is in both {located[name].file.name} and {file}")
                elif weight_map is not None and weight_map.get(name) != file:
                    problems.append(f"{name} is in {file}; {INDEX_FILE} says {weight_map.get(name)}")
                located[name] = stored
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
        return sum(stored.num_bytes for stored in self.stored.values())

    @property
    def files(self) -> list[Path]:
        """Data files."""
        return sorted({stored.file for stored in self.stored.values()})

    def read(self, name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        """A tensor, or ``[start, start + length)`` of its dimension `dim`, from disk. A `patterns.TensorReader`."""
        return self.stored[name].read(dim, start, length)

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


def _read_index(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not an index: expected JSON with a weight_map of tensor names to files") from error


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> place of a safetensors file's tensors: 8 bytes of length, then JSON, then the bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size):
            raise ValueError(f"{file} is not a safetensors file (or is truncated)")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
            }
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{file} is not a safetensors file: its header does not describe tensors") from error
    if quantised := sorted({dtype for dtype, *_ in entries.values()} - DTYPES.keys()):
        names = ", ".join(name for name, (dtype, *_) in entries.items() if dtype in quantised)
        raise ValueError(
            f"{file}: unsupported dtype {', '.join(quantised)} of {names}; supported: {', '.join(DTYPES)} (quantised "
            "releases have a bf16 original)"
        )
    end = 8 + length + max((stop for *_, stop in entries.values()), default=0)
    if size < end:
        raise ValueError(f"{file} is truncated: {size} bytes, its header asks for {end}")
    tensors = {}
    for name, (dtype, shape, begin, stop) in entries.items():
        stored = StoredTensor(file, 8 + length + begin, shape, DTYPES[dtype])
        if begin < 0 or stored.num_bytes != stop - begin:
            raise ValueError(f"{file}: {name} {shape} {dtype} has {stop - begin} bytes, not {stored.num_bytes}")
        tensors[name] = stored
    return tensors
