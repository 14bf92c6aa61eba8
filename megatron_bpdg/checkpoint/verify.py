"""The comparisons that prove a conversion."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.cast import Cast
from megatron_bpdg.checkpoint.hf import HFCheckpoint, same_bytes
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.ranks import Ranks
from megatron_bpdg.checkpoint.source import open_source
from megatron_bpdg.checkpoint.torch_dist_writer import weight_bytes
from megatron_bpdg.checkpoint.transfer import Transfer


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
