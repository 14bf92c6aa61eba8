"""A checkpoint of any format as the tensors of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.cast import Cast
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.hf_writer import emits_lm_head
from megatron_bpdg.checkpoint.legacy import LegacyCheckpoint, is_legacy
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping, mapping_for
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint, is_torch_dist
from megatron_bpdg.models.hf_config import hf_config_of


class MegatronSource(Protocol):
    """Whole tensors of a Megatron checkpoint in some format."""

    root: Path
    directory: Path

    @property
    def hf_folder(self) -> Path | None: ...
    @property
    def iteration(self) -> int | None: ...
    @property
    def dtypes(self) -> dict[str, torch.dtype]: ...
    @property
    def files(self) -> list[Path]: ...
    def check(self, mapping: ModelMapping) -> None: ...
    def read_weight(self, weight: Weight) -> Tensor: ...


def open_megatron(path: Path) -> MegatronSource:
    """Open a torch_dist or mp_rank checkpoint.

    Raises:
        FileNotFoundError, ValueError: see `TorchDistCheckpoint` and `LegacyCheckpoint`.
    """
    return LegacyCheckpoint(path) if is_legacy(path) else TorchDistCheckpoint(path)


def is_megatron(path: Path) -> bool:
    """Whether `path` is a Megatron checkpoint (or the ruins of one) rather than an HF directory."""
    return is_torch_dist(path) or is_legacy(path)


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint in any format, as the full Megatron tensors of its model.

    Attributes:
        config: normalised HF config.
        mapping: the model's weights.
        hf_folder: where config and tokenizer files come from.
        has_lm_head: whether a tied model's HF form repeats its embedding.
        dtypes: canonical key -> dtype.
        files: data files.
        read: one full Megatron tensor; safe in several threads at once.
        parts: the HF tensors of one Megatron tensor, by name; for an HF directory read as they are.
        is_hf: whether it is an HF directory.
    """

    config: dict[str, Any]
    mapping: ModelMapping
    hf_folder: Path
    has_lm_head: bool
    dtypes: dict[str, torch.dtype]
    files: list[Path]
    read: Callable[[Weight, Cast], Tensor]
    parts: Callable[[Weight, Cast], dict[str, Tensor]]
    is_hf: bool


def open_source(path: Path, hf_source: Path | None = None, *, mixed: bool = False) -> SourceModel:
    """Open and check a checkpoint of any format.

    Args:
        path: HF directory, or Megatron checkpoint with a tracker or one step of it.
        hf_source: for a Megatron checkpoint, HF directory with config.json and tokenizer; None: its own hf folder.
        mixed: allow parts of one tensor to have different dtypes (they are going to be cast).

    Raises:
        FileNotFoundError: the checkpoint, a file of it or its config is missing.
        MappingError: its tensors are not those that its config asks for; lists all of them.
        ValueError: a model, feature or file that is not supported.
    """
    if is_megatron(path):
        megatron = open_megatron(path)
        folder = megatron.hf_folder if hf_source is None else hf_source
        config = hf_config_of(folder, megatron.root)
        assert folder is not None
        mapping = mapping_for(config)
        megatron.check(mapping)

        def read_megatron(weight: Weight, cast: Cast) -> Tensor:
            return cast(weight.fit(megatron.read_weight(weight)), weight.key)

        def split_megatron(weight: Weight, cast: Cast) -> dict[str, Tensor]:
            return weight.split(read_megatron(weight, cast))

        return SourceModel(
            config,
            mapping,
            folder,
            emits_lm_head(folder),
            {key: dtype for key, dtype in megatron.dtypes.items() if key in mapping.by_key},
            megatron.files,
            read_megatron,
            split_megatron,
            is_hf=False,
        )
    if hf_source is not None:
        raise ValueError(f"--hf-source is for Megatron checkpoints; {path} has a config.json of its own")
    hf = HFCheckpoint(path)
    hf.check()

    def parts(weight: Weight, cast: Cast) -> dict[str, Tensor]:
        return {name: cast(hf.read(name), name) for name in weight.hf_names}

    def read_hf(weight: Weight, cast: Cast) -> Tensor:
        return weight.hf_to_megatron(list(parts(weight, cast).values()))

    dtypes = {weight.key: _common_dtype(weight, hf.dtypes, mixed) for weight in hf.mapping.weights}
    return SourceModel(hf.config, hf.mapping, path, hf.has_lm_head, dtypes, hf.files, read_hf, parts, is_hf=True)


def _common_dtype(weight: Weight, dtypes: Mapping[str, torch.dtype], mixed: bool) -> torch.dtype:
    """dtype of the HF parts of one Megatron tensor, which must agree: joining would silently promote."""
    found = {name: dtypes[name] for name in weight.hf_names}
    if len(set(found.values())) > 1 and not mixed:
        listing = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise MappingError(f"{weight.key} is made of tensors of different dtypes (cast with --dtype): {listing}")
    return found[weight.hf_names[0]]


def iter_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (HF name, full tensor), one layer's tensor in memory at a time; needs neither Megatron nor ranks.

    A tied model's repeated head is left out. A tensor may share its memory with others of the same layer.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks its hf folder.
        MappingError: tensors are missing, unknown or misshapen.
    """
    model = open_source(path, mixed=True)
    for weight in model.mapping.weights:
        yield from model.parts(weight, Cast()).items()
