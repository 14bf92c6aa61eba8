"""`bpdg convert`: between HF and Megatron checkpoints, shared by the ranks of torchrun, and its proof.

`convert` tells the direction and calls `hf_to_megatron` or `megatron_to_hf`, then `verify_conversion` on request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_bpdg.checkpoint.directory import HF_FOLDER, RELEASE, Source, write_hf_folder
from megatron_bpdg.checkpoint.files import staged_directory
from megatron_bpdg.checkpoint.hf import (
    MAX_SHARD_SIZE,
    Shard,
    dtype_name,
    hf_plan,
    plan_shards,
    same_bytes,
    set_config_dtype,
    write_hf_common,
    write_shard,
)
from megatron_bpdg.checkpoint.legacy import is_legacy
from megatron_bpdg.checkpoint.mapping import EMBEDDING, MappingError
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.source import SourceModel, is_megatron, open_source
from megatron_bpdg.checkpoint.torch_dist_writer import (
    MAX_FILE_SIZE,
    check_stacked_dtypes,
    write_dist_common,
    write_torch_dist,
)
from megatron_bpdg.checkpoint.transfer import Transfer
from megatron_bpdg.parallel.together import each, everyone, my_share, on_first, this_rank
from megatron_bpdg.tracking.progress import progress_bar

# Headers, metadata and tokenizer files on top of the tensors.
_DISK_MARGIN = 64 * 2**20
# Ranks meet only after each has written its share, which takes as long as it takes.
_TIMEOUT = timedelta(days=7)


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


_DEFAULT = Options()


def convert(
    source: Path,
    target: Path,
    options: Options,
    *,
    to: str | None = None,
    hf_source: Path | None = None,
    verify: bool = False,
    agree: Callable[[Path, Path], str] | None = None,
) -> None:
    """Convert HF -> torch_dist, or Megatron -> HF; under torchrun, shared by its ranks.

    Args:
        source: HF directory, torch_dist or mp_rank checkpoint.
        target: new directory.
        options: see `Options`.
        to: format of the target; None: the one that the source is not in. An mp_rank checkpoint can become either.
        hf_source: config and tokenizer of a Megatron checkpoint that has no hf folder.
        verify: take the target back to the source and compare every tensor's name, shape, dtype and bytes.
        agree: given the HF directory and the torch_dist checkpoint, compares their models and says how; or raises.

    Raises:
        FileNotFoundError, FileExistsError, MappingError, OSError, ValueError: see `hf_to_megatron`.
    """
    if to not in (None, "hf", "megatron"):
        raise ValueError(f"--to {to!r} is not known; choose hf or megatron")
    to_hf = is_megatron(source) if to is None else to == "hf"
    if to_hf and not is_megatron(source):
        raise ValueError(f"{source} is not a Megatron checkpoint: it cannot be converted to HF")
    if not to_hf and is_megatron(source) and not is_legacy(source):
        raise ValueError(f"{source} is a Megatron checkpoint already; it loads at any parallel layout as it is")
    if agree is not None and is_legacy(source):
        raise ValueError(
            "--verify-logits compares an HF directory with a torch_dist checkpoint, not with mp_rank files"
        )
    with _ranks_of_torchrun():
        console = Console(stderr=True, quiet=this_rank() > 0)
        if agree is not None and dist.is_initialized():
            raise ValueError("--verify-logits runs in one process: convert under torchrun, then compare without it")
        run = megatron_to_hf if to_hf else hf_to_megatron
        run(source, target, hf_source=hf_source, options=options, console=console)
        if verify:
            if differences := verify_conversion(source, target, hf_source=hf_source, options=options):
                raise MappingError("the round trip is not exact:\n  " + "\n  ".join(differences))
            console.print("verified: names, shapes, dtypes and bytes of all tensors survive the round trip")
        console.print(f"written: {target}")
    if agree is not None:
        console.print(agree(target, source) if to_hf else agree(source, target))


@contextmanager
def _ranks_of_torchrun() -> Iterator[None]:
    """The ranks that torchrun started, if it did, in a gloo group: their number has nothing to do with a layout."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def hf_to_megatron(
    src: str | Path,
    dst: str | Path,
    *,
    hf_source: str | Path | None = None,
    options: Options = _DEFAULT,
    console: Console | None = None,
) -> Path:
    """Convert an HF directory (or an mp_rank checkpoint) to torch_dist, loadable at any parallel layout.

    Holds `options.memory` bytes of tensors, or the largest one. `dst` appears only when complete; of an interrupted
    conversion nothing is left. Collective over the world, whose ranks share the work.

    Args:
        src: HF directory with safetensors weights, or Megatron checkpoint.
        dst: new checkpoint directory.
        hf_source: see `open_source`.
        options: see `Options`.
        console: where the progress bar goes; None: no progress bar.

    Returns:
        `dst`.

    Raises:
        FileNotFoundError: `src` or a file of it is missing.
        FileExistsError: `dst` exists and may not be replaced.
        MappingError: the tensors are not those the config asks for; lists all of them.
        OSError: not enough disk space, or another process is converting to `dst`.
        RuntimeError: another rank failed.
        ValueError: a model or feature that is not supported; `dst` holds the source.
    """
    model = open_source(Path(src), hf_source, options.dtype)
    check_stacked_dtypes(model)

    def finish() -> None:
        write_dist_common(building, model.config)
        dtype = dtype_name(model.dtypes[EMBEDDING])
        write_hf_folder(building, model.hf_folder, Source(model.has_lm_head, model.config["vocab_size"], dtype))
        if options.dtype is not None:
            set_config_dtype(building / HF_FOLDER / "config.json", options.dtype)

    sizes = [model.num_bytes(weight) for weight in model.mapping.weights]
    with _building(model, Path(dst), "to Megatron", sizes, options, console) as (building, transfer):
        write_torch_dist(building / RELEASE, model, transfer, max_file_size=options.max_file_size or MAX_FILE_SIZE)
        on_first(finish)
    return Path(dst)


def megatron_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    hf_source: str | Path | None = None,
    options: Options = _DEFAULT,
    console: Console | None = None,
) -> Path:
    """Convert a Megatron checkpoint (torch_dist at any layout, or mp_rank files) to an HF model directory.

    Memory, arguments, ranks and errors are those of `hf_to_megatron`.
    """
    model = open_source(Path(src), hf_source, options.dtype)
    mapping = model.mapping
    plan = hf_plan(mapping, model.dtypes, lm_head=model.has_lm_head)
    shards = plan_shards(plan, options.max_file_size or MAX_SHARD_SIZE)
    weight_of = {name: weight for weight in mapping.weights for name in mapping.hf_shapes(weight, lm_head=True)}

    def tensors(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        """What a file holds; its neighbours from one Megatron tensor are read together."""
        for weight, group in groupby(shard.tensors, lambda tensor: weight_of[tensor.name]):
            planned = list(group)
            with transfer.tensor(sum(tensor.num_bytes for tensor in planned), model.cost(weight)):
                parts = mapping.hf_parts(weight, model.read(weight), lm_head=True)
                for tensor in planned:
                    yield tensor.name, parts[tensor.name]
                del parts

    sizes = [shard.num_bytes for shard in shards]
    with _building(model, Path(dst), "to HF", sizes, options, console) as (building, transfer):
        mine = [shards[i] for i in my_share(len(shards))]
        each(lambda: transfer.run(partial(write_shard, building, shard, tensors(shard)) for shard in mine))
        on_first(lambda: write_hf_common(building, shards, model.hf_folder, options.dtype))
    return Path(dst)


@contextmanager
def _building(
    model: SourceModel, dst: Path, title: str, sizes: list[int], options: Options, console: Console | None
) -> Iterator[tuple[Path, Transfer]]:
    """Where `dst` is being built, and how its parts get there, whose `sizes` are given; says at the end how it went."""
    for file in (*model.checkpoint.files, model.hf_folder / "config.json"):
        if dst.resolve() in file.resolve().parents:
            raise ValueError(f"{dst} holds {file}, which the conversion reads: choose another destination")

    started = time.monotonic()
    with (
        staged_directory(dst, overwrite=options.overwrite, needed_bytes=sum(sizes) + _DISK_MARGIN) as building,
        progress_bar(console, title, sum(sizes[i] for i in my_share(len(sizes)))) as advance,
    ):
        yield building, Transfer(options.workers, options.memory, advance)
    model.cast.add_up()
    if console is not None:
        seconds, total = time.monotonic() - started, sum(sizes) / 1e9
        console.print(f"{title}: {total:.2f} GB in {seconds:.1f} s ({total / seconds:.2f} GB/s)")
        console.print(model.cast.statement())


def verify_conversion(
    source: Path, target: Path, *, hf_source: Path | None = None, options: Options = _DEFAULT
) -> list[str]:
    """Take the target back to the source's HF tensors and compare names, shapes, dtypes and bytes, streaming.

    Both are read from disk anew. Where one is an HF directory, its tensors are compared as they are stored there.
    Collective over the world, whose ranks share the work.

    Args:
        source, target: what was converted, and what it became.
        hf_source: see `open_source`; of the source.
        options: those of the conversion: the source is cast first, as it did.

    Returns:
        Every difference; on every rank, those of all ranks.
    """
    left, right = open_source(source, hf_source, options.dtype), open_source(target)
    ours, theirs = (model.mapping.hf_tensors(lm_head=model.has_lm_head) for model in (left, right))
    differences = [f"{name}: only in {source}" for name in ours if name not in theirs]
    differences += [f"{name}: only in {target}" for name in theirs if name not in ours]
    if left.mapping.by_key.keys() != right.mapping.by_key.keys():
        return differences
    transfer = Transfer(options.workers, options.memory)

    def compare(weight: Weight) -> list[str]:
        size = weight.num_bytes(left.stored[weight.key])
        with transfer.tensor(size, 3 * size):
            ours, theirs = left.parts(weight), right.parts(right.mapping.by_key[weight.key])
            pairs = {name: _difference(ours[name], theirs[name]) for name in weight.hf_names}
            return [f"{name}: {difference}" for name, difference in pairs.items() if difference]

    share = [left.mapping.weights[i] for i in my_share(len(left.mapping.weights))]
    mine = each(lambda: transfer.run(partial(compare, weight) for weight in share))
    return differences + [line for lists in everyone(mine) for lines in lists for line in lines]


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
