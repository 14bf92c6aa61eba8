"""Conversions between HF and Megatron checkpoints: streamed, parallel, resumable, shared by the ranks of torchrun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megatron_bpdg.checkpoint.cast import Cast
from megatron_bpdg.checkpoint.directory import RELEASE, Source
from megatron_bpdg.checkpoint.files import check_disk_space, copy_sidecars
from megatron_bpdg.checkpoint.hf_writer import (
    TensorPlan,
    hf_plan,
    plan_shards,
    set_config_dtype,
    write_index,
    write_shard,
)
from megatron_bpdg.checkpoint.mapping import LM_HEAD
from megatron_bpdg.checkpoint.partial import partial_directory, partial_path
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.ranks import Ranks
from megatron_bpdg.checkpoint.source import SourceModel, open_source
from megatron_bpdg.checkpoint.torch_dist_writer import (
    MAX_FILE_SIZE,
    plan_dist_files,
    weight_bytes,
    without_crc32,
    write_dist_common,
    write_dist_file,
    write_dist_metadata,
    write_hf_folder,
)
from megatron_bpdg.checkpoint.transfer import OutputFile, has_record, is_complete, read_record, transfer
from megatron_bpdg.tracking.progress import progress_bar

MAX_SHARD_SIZE = 5 * 10**9
# Headers, metadata and tokenizer files on top of the tensors.
_DISK_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class Options:
    """How a conversion runs; none of it but `dtype` and `max_file_size` changes what is written.

    Attributes:
        dtype: cast to this; None: keep each tensor's dtype, byte for byte.
        max_file_size: bytes per data file; None: 5 GB for safetensors, 2 GB for torch_dist.
        workers: threads that read, and threads that write.
        memory: bytes of tensors held at once (the largest tensor, where that is more).
        overwrite: replace an existing target.
        restart: delete what an interrupted conversion left instead of continuing it.
    """

    dtype: torch.dtype | None = None
    max_file_size: int | None = None
    workers: int = 2
    memory: int = 2**30
    overwrite: bool = False
    restart: bool = False

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

    Holds `options.memory` bytes of tensors, or the largest one. `dst` appears only when complete; an interrupted
    conversion continues where it was.

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
        FileExistsError: `dst` exists and may not be replaced, or another unfinished conversion is in the way.
        MappingError: the tensors are not those the config asks for; lists all of them.
        OSError: not enough disk space.
        ValueError: a model or feature that is not supported; `dst` holds the source.
    """
    options = _with(options, overwrite)
    cast = Cast(options.dtype)
    model = open_source(Path(src), _path(hf_source), mixed=options.dtype is not None)
    mapping = model.mapping
    dtypes = {key: cast.of(dtype) for key, dtype in model.dtypes.items()}
    plan = plan_dist_files(mapping, dtypes, options.max_file_size or MAX_FILE_SIZE)
    files = []
    for file in plan:
        weights = [(weight, _cost(weight, model.dtypes, dtypes)) for weight in file.weights]
        size = sum(weight_bytes(weight, dtypes[weight.key]) for weight in file.weights)
        files.append(OutputFile(f"{RELEASE}/{file.name}", size, weights, partial(write_dist_file, file, mapping)))

    def finish(building: Path) -> None:
        records = {file.name: read_record(building, file.name) for file in plan}
        write_dist_metadata(building / RELEASE, mapping, dtypes, records)
        write_dist_common(building, model.config)
        dtype = str(dtypes[mapping.embedding.key]).removeprefix("torch.")
        write_hf_folder(building, model.hf_folder, Source(model.has_lm_head, model.config["vocab_size"], dtype))
        if options.dtype is not None:
            set_config_dtype(building / "hf" / "config.json", options.dtype)

    return _convert(model, Path(dst), "to Megatron", files, finish, cast, options, console, ranks or Ranks())


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
    cast = Cast(options.dtype)
    model = open_source(Path(src), _path(hf_source), mixed=options.dtype is not None)
    mapping, lm_head = model.mapping, model.has_lm_head
    dtypes = {key: cast.of(dtype) for key, dtype in model.dtypes.items()}
    weight_of = {name: weight for weight in mapping.weights for name in weight.hf_names}
    if mapping.tied and lm_head:
        weight_of[LM_HEAD] = mapping.embedding
    shards = plan_shards(hf_plan(mapping, dtypes, lm_head=lm_head), options.max_file_size or MAX_SHARD_SIZE)
    files = []
    for shard in shards:
        groups = list(_groups(shard.ordered, weight_of))
        weights = [(weight, _cost(weight, model.dtypes, dtypes)) for weight, _ in groups]
        write = partial(write_shard, shard, [parts for _, parts in groups])
        files.append(OutputFile(shard.file, shard.num_bytes, weights, write))

    def finish(building: Path) -> None:
        write_index(building, shards)
        copy_sidecars(model.hf_folder, building)
        if options.dtype is not None:
            set_config_dtype(building / "config.json", options.dtype)

    return _convert(model, Path(dst), "to HF", files, finish, cast, options, console, ranks or Ranks())


def _groups(
    tensors: Sequence[TensorPlan], weight_of: Mapping[str, Weight]
) -> Iterator[tuple[Weight, list[TensorPlan]]]:
    """Runs of tensors that come from one Megatron tensor, which is then read once."""
    run: list[TensorPlan] = []
    for tensor in tensors:
        if run and weight_of[run[0].name] is not weight_of[tensor.name]:
            yield weight_of[run[0].name], run
            run = []
        run.append(tensor)
    if run:
        yield weight_of[run[0].name], run


def _with(
    options: Options | None,
    overwrite: bool,
    dtype: torch.dtype | None = None,
    max_file_size: int | None = None,
) -> Options:
    options = options or Options()
    return Options(
        dtype or options.dtype,
        options.max_file_size if max_file_size is None else max_file_size,
        options.workers,
        options.memory,
        overwrite or options.overwrite,
        options.restart,
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
    files: Sequence[OutputFile],
    finish: Callable[[Path], None],
    cast: Cast,
    options: Options,
    console: Console | None,
    ranks: Ranks,
) -> Path:
    for file in (*model.files, model.hf_folder / "config.json"):
        if dst.resolve() in file.resolve().parents:
            raise ValueError(f"{dst} holds {file}, which the conversion reads: choose another destination")
    plan = {
        "format": 1,
        "target": title,
        "dtype": str(options.dtype),
        "source": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(model.files)],
        "files": [[file.name, file.num_bytes, [weight.key for weight, _ in file.weights]] for file in files],
    }
    total = sum(file.num_bytes for file in files)
    done = partial_path(dst)
    missing = sum(file.num_bytes for file in files if options.restart or not has_record(done, file.name))
    ranks.on_first(lambda: check_disk_space(dst, missing + _DISK_MARGIN))
    started = time.monotonic()
    try:
        with partial_directory(dst, plan, ranks, overwrite=options.overwrite, restart=options.restart) as building:
            for parent in {(building / file.name).parent for file in files}:
                parent.mkdir(exist_ok=True)
            mine = files[ranks.rank :: ranks.size]
            ranks.each(
                lambda: _write_files(mine, building, title, model, cast, options, console if ranks.first else None)
            )
            ranks.on_first(lambda: finish(building))
    except BaseException:
        if console is not None and ranks.first and done.is_dir():
            console.print(f"unfinished: complete files are kept in {done}; the same command continues, or delete it")
        raise
    cast.merge(ranks.gather(cast.counts))
    if console is not None and ranks.first:
        seconds = time.monotonic() - started
        console.print(f"{title}: {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s)")
        console.print(cast.statement())
    return dst


def _write_files(
    files: Sequence[OutputFile],
    building: Path,
    title: str,
    model: SourceModel,
    cast: Cast,
    options: Options,
    console: Console | None,
) -> None:
    """Write those files that an earlier, interrupted conversion did not complete."""
    with progress_bar(console, title, sum(file.num_bytes for file in files)) as advance:
        todo = [file for file in files if not is_complete(building, file.name)]
        advance(sum(file.num_bytes for file in files) - sum(file.num_bytes for file in todo))
        if len(todo) < len(files) and console is not None:
            console.print(f"continuing: {len(files) - len(todo)} of {len(files)} files were complete and are intact")
        with without_crc32():
            transfer(
                todo,
                building,
                lambda weight: model.read(weight, cast),
                workers=options.workers,
                memory=options.memory,
                advance=advance,
            )
