"""Conversions between HF and Megatron checkpoints, shared by the ranks of torchrun, and their proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megatron_bpdg.checkpoint.directory import RELEASE, Source, write_hf_folder
from megatron_bpdg.checkpoint.files import check_disk_space, check_free, copy_sidecars, staged_directory
from megatron_bpdg.checkpoint.hf import (
    MAX_SHARD_SIZE,
    HFCheckpoint,
    Shard,
    hf_plan,
    plan_shards,
    same_bytes,
    set_config_dtype,
    write_index,
    write_shard,
)
from megatron_bpdg.checkpoint.mapping import LM_HEAD
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.source import Cast, SourceModel, open_source
from megatron_bpdg.checkpoint.torch_dist_writer import (
    MAX_FILE_SIZE,
    check_stacked_dtypes,
    weight_bytes,
    write_dist_common,
    write_torch_dist,
)
from megatron_bpdg.checkpoint.transfer import Ranks, Transfer
from megatron_bpdg.tracking.progress import progress_bar

# Headers, metadata and tokenizer files on top of the tensors.
_DISK_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class Options:
    """How a conversion runs; none of it but `dtype` and `max_file_size` changes what is written.

    Attributes:
        dtype: cast to this; None: keep each tensor's dtype, byte for byte.
        max_file_size: bytes per data file; None: 5 GB for safetensors, 2 GB for torch_dist.
        workers: threads that read and write.
        memory: bytes of tensors held at once (the largest tensor, where that is more).
        overwrite: replace an existing target.
    """

    dtype: torch.dtype | None = None
    max_file_size: int | None = None
    workers: int = 2
    memory: int = 2**30
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "memory", "max_file_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


def hf_to_megatron(
    src: str | Path,
    dst: str | Path,
    *,
    hf_source: str | Path | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Convert an HF directory (or an mp_rank checkpoint) to torch_dist, loadable at any parallel layout.

    Holds `options.memory` bytes of tensors, or the largest one. `dst` appears only when complete; of an interrupted
    conversion nothing is left.

    Args:
        src: HF directory with safetensors weights, or Megatron checkpoint.
        dst: new checkpoint directory.
        hf_source: see `open_source`.
        options: see `Options`.
        overwrite: short for the option.
        console: where the progress bar goes; None: no progress bar.
        ranks: processes that share the work, all of which call this; None: one.

    Returns:
        `dst`.

    Raises:
        FileNotFoundError: `src` or a file of it is missing.
        FileExistsError: `dst` exists and may not be replaced.
        MappingError: the tensors are not those the config asks for; lists all of them.
        OSError: not enough disk space, or another process is converting to `dst`.
        ValueError: a model or feature that is not supported; `dst` holds the source.
    """
    options = _with(options, overwrite)
    cast, ranks = Cast(options.dtype), ranks or Ranks()
    model = open_source(Path(src), _path(hf_source), mixed=options.dtype is not None)
    mapping = model.mapping
    dtypes = {key: cast.of(dtype) for key, dtype in model.dtypes.items()}
    check_stacked_dtypes(mapping, dtypes)

    def write(building: Path, transfer: Transfer) -> None:
        write_torch_dist(
            building / RELEASE,
            mapping,
            dtypes,
            lambda weight: model.read(weight, cast),
            lambda weight: _cost(weight, model.dtypes, dtypes),
            transfer,
            max_file_size=options.max_file_size or MAX_FILE_SIZE,
            ranks=ranks,
        )

    def finish(building: Path) -> None:
        write_dist_common(building, model.config)
        dtype = str(dtypes[mapping.embedding.key]).removeprefix("torch.")
        write_hf_folder(building, model.hf_folder, Source(model.has_lm_head, model.config["vocab_size"], dtype))
        if options.dtype is not None:
            set_config_dtype(building / "hf" / "config.json", options.dtype)

    sizes = [weight_bytes(weight, dtypes[weight.key]) for weight in mapping.weights]
    _convert(model, Path(dst), "to Megatron", sizes, write, finish, cast, options, console, ranks)
    return Path(dst)


def megatron_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    hf_source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Convert a Megatron checkpoint (torch_dist at any layout, or mp_rank files) to an HF model directory.

    Args:
        src: checkpoint directory with a tracker, or one step's directory.
        dst: new HF directory.
        hf_source: see `open_source`.
        dtype, max_shard_size, overwrite: short for the options.
        options, console, ranks: as for `hf_to_megatron`.

    Returns:
        `dst`.

    Raises:
        As `hf_to_megatron`.
    """
    options = _with(options, overwrite, dtype, max_shard_size)
    cast, ranks = Cast(options.dtype), ranks or Ranks()
    model = open_source(Path(src), _path(hf_source), mixed=options.dtype is not None)
    mapping, lm_head = model.mapping, model.has_lm_head
    dtypes = {key: cast.of(dtype) for key, dtype in model.dtypes.items()}
    shards = plan_shards(hf_plan(mapping, dtypes, lm_head=lm_head), options.max_file_size or MAX_SHARD_SIZE)
    weight_of = {name: weight for weight in mapping.weights for name in weight.hf_names}
    if mapping.tied:
        weight_of[LM_HEAD] = mapping.embedding

    def tensors(shard: Shard, transfer: Transfer) -> Iterator[tuple[str, Tensor]]:
        """What a file holds; its neighbours from one Megatron tensor are read together."""
        for weight, group in groupby(shard.tensors, lambda tensor: weight_of[tensor.name]):
            planned = list(group)
            with transfer.tensor(sum(t.num_bytes for t in planned), _cost(weight, model.dtypes, dtypes)):
                parts = weight.split(model.read(weight, cast))
                for tensor in planned:
                    # A tied model's repeated head is the only tensor under a name that its weight does not know.
                    yield tensor.name, parts[tensor.name if tensor.name in parts else weight.hf_names[0]]
                del parts

    def write(building: Path, transfer: Transfer) -> None:
        mine = shards[ranks.rank :: ranks.size]
        ranks.each(
            lambda: transfer.run(partial(write_shard, building, shard, tensors(shard, transfer)) for shard in mine)
        )

    def finish(building: Path) -> None:
        write_index(building, shards)
        copy_sidecars(model.hf_folder, building)
        if options.dtype is not None:
            set_config_dtype(building / "config.json", options.dtype)

    sizes = [shard.num_bytes for shard in shards]
    _convert(model, Path(dst), "to HF", sizes, write, finish, cast, options, console, ranks)
    return Path(dst)


def _with(
    options: Options | None,
    overwrite: bool,
    dtype: torch.dtype | None = None,
    max_file_size: int | None = None,
) -> Options:
    options = options or Options()
    return replace(
        options,
        dtype=dtype or options.dtype,
        max_file_size=options.max_file_size if max_file_size is None else max_file_size,
        overwrite=overwrite or options.overwrite,
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _cost(weight: Weight, source: Mapping[str, torch.dtype], target: Mapping[str, torch.dtype]) -> int:
    """Bytes held while a tensor is under way: its parts as read, and joined, cast or split."""
    sizes = [weight_bytes(weight, dtypes[weight.key]) for dtypes in (source, target)]
    copied = len(weight.hf_names) > 1 or source[weight.key] != target[weight.key]
    return sum(sizes) if copied else sizes[0]


def _convert(
    model: SourceModel,
    dst: Path,
    title: str,
    sizes: list[int],
    write: Callable[[Path, Transfer], object],
    finish: Callable[[Path], None],
    cast: Cast,
    options: Options,
    console: Console | None,
    ranks: Ranks,
) -> None:
    """Build `dst`: `write` by all ranks, each its share of the parts whose `sizes` are given, `finish` by the first."""
    for file in (*model.files, model.hf_folder / "config.json"):
        if dst.resolve() in file.resolve().parents:
            raise ValueError(f"{dst} holds {file}, which the conversion reads: choose another destination")

    def check() -> None:
        check_free(dst, overwrite=options.overwrite)
        check_disk_space(dst, sum(sizes) + _DISK_MARGIN)

    ranks.on_first(check)
    started = time.monotonic()
    bar = progress_bar(console if ranks.first else None, title, sum(sizes[ranks.rank :: ranks.size]))
    with staged_directory(dst, overwrite=options.overwrite, ranks=ranks) as building:
        with bar as advance:
            write(building, Transfer(options.workers, options.memory, advance))
        ranks.on_first(lambda: finish(building))
    cast.merge(ranks.gather(cast.counts))
    if console is not None and ranks.first:
        seconds, total = time.monotonic() - started, sum(sizes) / 1e9
        console.print(f"{title}: {total:.2f} GB in {seconds:.1f} s ({total / seconds:.2f} GB/s)")
        console.print(cast.statement())


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
        elif difference := _difference(left.read(name), right.read(name)):
            differences.append(f"{name}: {difference}")
    return differences


def _difference(one: Tensor, two: Tensor) -> str | None:
    """In what two tensors differ, bit for bit."""
    if one.shape != two.shape:
        return f"shape {tuple(one.shape)} and {tuple(two.shape)}"
    if one.dtype != two.dtype:
        return f"dtype {one.dtype} and {two.dtype}"
    if same_bytes(one, two):
        return None
    unequal = one.contiguous().flatten().view(torch.uint8) != two.contiguous().flatten().view(torch.uint8)
    count = int(unequal.view(-1, one.element_size()).any(1).sum())
    return f"{count} of {one.numel()} elements differ"


def verify_conversion(
    source: Path,
    target: Path,
    *,
    hf_source: Path | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 2,
    memory: int = 2**30,
    ranks: Ranks | None = None,
) -> list[str]:
    """Take the target back to the source's HF tensors and compare names, shapes, dtypes and bytes, streaming.

    Both are read from disk anew. Where one is an HF directory, its tensors are compared as they are stored there.

    Args:
        source: what was converted.
        target: what it became.
        hf_source: see `open_source`; of the source.
        dtype: the source is cast to this first, as the conversion did.
        workers: threads.
        memory: bytes of tensors held at once.
        ranks: processes that share the work; None: one.

    Returns:
        Every difference; on every rank, those of all ranks.
    """
    ranks = ranks or Ranks()
    left, right = open_source(source, hf_source, mixed=dtype is not None), open_source(target)
    names = [model.mapping.hf_tensors(lm_head=model.has_lm_head) for model in (left, right)]
    differences = [f"{name}: only in {source}" for name in names[0] if name not in names[1]]
    differences += [f"{name}: only in {target}" for name in names[1] if name not in names[0]]
    if left.mapping.by_key.keys() != right.mapping.by_key.keys():
        return differences
    transfer, cast = Transfer(workers, memory), Cast(dtype)

    def compare(weight: Weight) -> list[str]:
        size = weight_bytes(weight, left.dtypes[weight.key])
        with transfer.tensor(size, 3 * size):
            ours, theirs = left.parts(weight, cast), right.parts(right.mapping.by_key[weight.key], Cast())
            pairs = {name: _difference(ours[name], theirs[name]) for name in weight.hf_names}
            return [f"{name}: {difference}" for name, difference in pairs.items() if difference]

    share = left.mapping.weights[ranks.rank :: ranks.size]
    mine = ranks.each(lambda: transfer.run(partial(compare, weight) for weight in share))
    return differences + [line for lists in ranks.gather(mine) for lines in lists for line in lines]
