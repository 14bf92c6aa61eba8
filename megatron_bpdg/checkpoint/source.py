"""A checkpoint of any format as the tensors of its model, in any dtype."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.directory import METADATA_FILE, TRACKER_FILE, checkpoints_of
from megatron_bpdg.checkpoint.hf import HFCheckpoint, dtype_name, emits_lm_head
from megatron_bpdg.checkpoint.legacy import LegacyCheckpoint, is_legacy
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_bpdg.models.hf_config import hf_config_of
from megatron_bpdg.parallel.together import everyone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is one of `target`."""
    if source == target:
        return True
    a, b = torch.finfo(source), torch.finfo(target)
    # Subnormals included: the smallest step above zero of the source must be a multiple of the target's.
    return b.eps <= a.eps and b.max >= a.max and b.smallest_normal * b.eps <= a.smallest_normal * a.eps


class Cast:
    """Casts weights to one dtype, or leaves them alone, and counts what changed. Safe in several threads at once.

    Args:
        dtype: target; None: every tensor as it is.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.elements = self.rounded = 0
        self._sources: set[torch.dtype] = set()
        self._lock = threading.Lock()

    def __call__(self, tensor: Tensor, name: str) -> Tensor:
        """The cast tensor, itself where it already has the dtype.

        Raises:
            ValueError: where a finite value becomes infinite.
        """
        if self.dtype is None or tensor.dtype == self.dtype:
            return tensor
        cast = tensor.to(self.dtype)
        rounded = 0
        if not is_exact(tensor.dtype, self.dtype):
            overflow = int((cast.isinf() & tensor.isfinite()).sum())
            if overflow:
                raise ValueError(
                    f"{name}: {overflow} of {tensor.numel()} values are too large for {dtype_name(self.dtype)} "
                    f"(largest {torch.finfo(self.dtype).max:.4g}); choose bfloat16 or float32"
                )
            wide = torch.promote_types(tensor.dtype, self.dtype)
            rounded = int(((cast.to(wide) != tensor.to(wide)) & ~tensor.isnan()).sum())
        with self._lock:
            self._sources.add(tensor.dtype)
            self.elements += tensor.numel()
            self.rounded += rounded
        return cast

    def add_up(self) -> None:
        """Count what all ranks did. Collective over the world."""
        elements, rounded, sources = zip(*everyone((self.elements, self.rounded, self._sources)), strict=True)
        self.elements, self.rounded, self._sources = sum(elements), sum(rounded), set().union(*sources)

    def statement(self) -> str:
        """One line on how exact the conversion was."""
        if self.dtype is None or not self._sources:
            return "dtypes unchanged: every tensor is byte-exact"
        sources = "/".join(sorted(map(dtype_name, self._sources)))
        if all(is_exact(source, self.dtype) for source in self._sources):
            return f"{sources} to {dtype_name(self.dtype)}: exact, every value is kept"
        share = self.rounded / self.elements if self.elements else 0.0
        return (
            f"{sources} to {dtype_name(self.dtype)}: rounded to nearest, {self.rounded} of {self.elements} values "
            f"changed ({share:.2%}), by at most 1 in {2 / torch.finfo(self.dtype).eps:.0f} where normal"
        )


def open_megatron(path: Path) -> LegacyCheckpoint | TorchDistCheckpoint:
    """Open a torch_dist or mp_rank checkpoint.

    Raises:
        FileNotFoundError, ValueError: see `TorchDistCheckpoint` and `LegacyCheckpoint`.
    """
    return LegacyCheckpoint(path) if is_legacy(path) else TorchDistCheckpoint(path)


def is_megatron(path: Path) -> bool:
    """Whether `path` is a Megatron checkpoint (or the ruins of one) rather than an HF directory."""
    root = checkpoints_of(path)
    return (root / TRACKER_FILE).is_file() or (root / METADATA_FILE).is_file() or is_legacy(path)


@dataclass
class SourceModel:
    """A checkpoint in any format, as the full Megatron tensors of its model; see `open_source`.

    Attributes:
        checkpoint: as it is stored, checked.
        config: normalised HF config.
        mapping: the model's weights.
        hf_folder: where config and tokenizer files come from.
        has_lm_head: whether a tied model's HF form repeats its embedding.
        cast: what each tensor goes through.
    """

    checkpoint: HFCheckpoint | LegacyCheckpoint | TorchDistCheckpoint
    config: dict[str, Any]
    mapping: ModelMapping
    hf_folder: Path
    has_lm_head: bool
    cast: Cast

    @cached_property
    def stored(self) -> dict[str, torch.dtype]:
        """Canonical key -> dtype on disk.

        Raises:
            MappingError: without a cast, where HF parts of one tensor differ: joining would silently promote.
        """
        if not isinstance(self.checkpoint, HFCheckpoint):
            return {key: dtype for key, dtype in self.checkpoint.dtypes.items() if key in self.mapping.by_key}
        stored = {}
        for weight in self.mapping.weights:
            found = {name: self.checkpoint.dtypes[name] for name in weight.hf_names}
            if len(set(found.values())) > 1 and self.cast.dtype is None:
                listing = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
                raise MappingError(
                    f"{weight.key} is made of tensors of different dtypes (cast with --dtype): {listing}"
                )
            stored[weight.key] = found[weight.hf_names[0]]
        return stored

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Canonical key -> dtype of what `read` gives."""
        return {key: self.cast.dtype or dtype for key, dtype in self.stored.items()}

    def num_bytes(self, weight: Weight) -> int:
        """Size of what `read` gives."""
        return weight.num_bytes(self.dtypes[weight.key])

    def cost(self, weight: Weight) -> int:
        """Bytes held while a tensor is under way: its parts as read, and joined, cast or split."""
        read = weight.num_bytes(self.stored[weight.key])
        if len(weight.hf_names) == 1 and self.stored[weight.key] == self.dtypes[weight.key]:
            return read
        return read + self.num_bytes(weight)

    def read(self, weight: Weight) -> Tensor:
        """One full Megatron tensor; safe in several threads at once."""
        if isinstance(self.checkpoint, HFCheckpoint):
            return weight.hf_to_megatron(list(self.parts(weight).values()))
        return self.cast(weight.fit(self.checkpoint.read_weight(weight)), weight.key)

    def parts(self, weight: Weight) -> dict[str, Tensor]:
        """The HF tensors of one Megatron tensor, by name; of an HF directory as they are there."""
        if isinstance(self.checkpoint, HFCheckpoint):
            return {name: self.cast(self.checkpoint.read(name), name) for name in weight.hf_names}
        return weight.split(self.read(weight))

    def read_shard(self, weight: Weight, tp_rank: int, tp_size: int) -> Tensor:
        """One tensor-parallel rank's part of a weight of a mapping whose vocabulary may be padded."""
        if isinstance(self.checkpoint, HFCheckpoint):
            return weight.read_shard(self.checkpoint.read, tp_rank, tp_size)
        # Through the HF parts: the vocabulary may be stored with another padding.
        return weight.shard(weight.hf_to_megatron(list(self.parts(weight).values())), tp_rank, tp_size)


def open_source(path: Path, hf_source: str | Path | None = None, dtype: torch.dtype | None = None) -> SourceModel:
    """Open and check a checkpoint of any format.

    Args:
        path: HF directory, or Megatron checkpoint with a tracker or one step of it.
        hf_source: for a Megatron checkpoint, HF directory with config.json and tokenizer; None: its own hf folder.
        dtype: cast to this; None: as stored.

    Raises:
        FileNotFoundError: the checkpoint, a file of it or its config is missing.
        MappingError: its tensors are not those that its config asks for; lists all of them.
        ValueError: a model, feature or file that is not supported.
    """
    if is_megatron(path):
        megatron = open_megatron(path)
        folder = megatron.hf_folder if hf_source is None else Path(hf_source)
        config = hf_config_of(folder, megatron.root)
        assert folder is not None
        mapping = mapping_for(config)
        megatron.check(mapping)
        return SourceModel(megatron, config, mapping, folder, emits_lm_head(folder), Cast(dtype))
    if hf_source is not None:
        raise ValueError(f"--hf-source is for Megatron checkpoints; {path} has a config.json of its own")
    hf = HFCheckpoint(path)
    hf.check()
    return SourceModel(hf, hf.config, hf.mapping, path, hf.has_lm_head, Cast(dtype))


def iter_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (HF name, full tensor), one layer's tensor in memory at a time; needs neither Megatron nor ranks.

    A tied model's repeated head is left out. A tensor may share its memory with others of the same layer.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks its hf folder.
        MappingError: tensors are missing, unknown or misshapen.
    """
    model = open_source(path)
    for weight in model.mapping.weights:
        yield from model.parts(weight).items()
