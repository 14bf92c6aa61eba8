"""The gate on sequence shards is the gate on the whole, whichever rank holds which token of a block."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.drift.diagnostics import drift_statistics, drift_sums
from megatron_bpdg.drift.gate import AGGREGATORS, Gate, Gated
from megatron_bpdg.drift.partition import FixedBlocks, NewlineSpans, Partition, WholeSequence
from megatron_bpdg.drift.signals import Segments, Signals, no_reduce
from megatron_bpdg.drift.sums import NamedSums
from megatron_bpdg.parallel.sequence import pad_to_multiple, sum_over
from tests.parallel.spawn import run_ranks

NEWLINE = 3
PARTITIONS: dict[str, Partition] = {
    "fixed": FixedBlocks(5),
    "newline": NewlineSpans({NEWLINE}, min_size=2, max_size=7),
    "sequence": WholeSequence(),
    "token": FixedBlocks(1),
}
LENGTHS = (3, 12, 2, 20)
ROWS = 20


def tokens(partition: Partition) -> dict[str, Any]:
    """Four responses with holes in their mask: 37 tokens, padded to 40, in blocks that straddle shards."""
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(0, 6, (n,), generator=generator) for n in LENGTHS]
    blocks: list[Tensor] = []
    indices: list[Tensor] = []
    for response in responses:
        own = partition(response)
        blocks.append(own + sum(len(index) for index in indices))
        indices.append(torch.arange(int(own[-1]) + 1))
    index_N, real_N = pad_to_multiple(torch.arange(sum(LENGTHS)), 4)
    count = len(index_N)
    return {
        "logprobs_N": -torch.rand(count, generator=generator),
        "old_logprobs_N": -torch.rand(count, generator=generator),
        "mask_N": real_N & (torch.rand(count, generator=generator) < 0.8),
        "block_N": torch.cat(blocks)[index_N],
        "num_blocks": sum(len(index) for index in indices),
        "sequence_N": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[index_N],
        "num_sequences": len(LENGTHS),
        "block_index_G": torch.cat(indices),
    }


def gated(gate: Gate, batch: dict[str, Any], **more: Any) -> Gated:
    signals = Signals(
        batch["logprobs_N"],
        batch["old_logprobs_N"],
        batch["mask_N"],
        blocks=Segments(batch["block_N"], batch["num_blocks"]),
        sequences=Segments(batch["sequence_N"], batch["num_sequences"]),
        **more,
    )
    return gate(signals)


def shard_errors(
    groups: list[dist.ProcessGroup], rank: int, shards: int, partitions: tuple[str, ...] = tuple(PARTITIONS)
) -> dict[str, float]:
    """Largest difference between this rank's shard of the gate and the same tokens of the whole gate."""
    errors = {}
    for name, aggregator, scope in itertools.product(partitions, AGGREGATORS, ("global", "sequence", "microbatch")):
        gate = Gate(aggregator=aggregator, unit_mean=scope)  # type: ignore[arg-type]
        batch = tokens(PARTITIONS[name])
        whole = gated(gate, batch)
        part = {key: value.chunk(shards)[rank].clone() if key.endswith("_N") else value for key, value in batch.items()}
        reduce = sum_over(groups)
        mine = gated(gate, part, reduce=reduce)

        drift_N = whole.drift_n.chunk(shards)[rank]
        sums = NamedSums(drift_sums(mine, part["mask_N"], batch["block_index_G"], ROWS, owns_blocks=rank == 0))
        summed = sums.over(reduce)
        whole_sums = drift_sums(whole, batch["mask_N"], batch["block_index_G"], ROWS, owns_blocks=True)
        pairs = {
            # Weights are float32 of a float64 sum: the last bit may round the other way.
            "weight": ((mine.weight_n - whole.weight_n.chunk(shards)[rank]).abs(), 2e-7),
            "gate": ((mine.gate_n - whole.gate_n.chunk(shards)[rank]).abs(), 2e-7),
            "drift": ((mine.drift_n - drift_N).abs(), 0.0),
            "mass": ((reduce(mine.mass.clone()) - whole.mass).abs(), 1e-12),
            "block_drift": ((mine.block_drift_G - whole.block_drift_G).abs(), 1e-12),
            "block_count": ((mine.block_count_G - whole.block_count_G).abs(), 0.0),
            **{f"sum of {sum_}": ((summed[sum_] - values).abs(), 1e-5) for sum_, values in whole_sums.items()},
        }
        for field, (error, tolerance) in pairs.items():
            if float(error.max()) > tolerance:
                errors[f"{name} {aggregator} {scope} {field}"] = float(error.max())
    return errors


def straddling() -> int:
    """How many blocks of the fixed partition lie on more than one of four shards."""
    block_N = tokens(PARTITIONS["fixed"])["block_N"][: sum(LENGTHS)]
    shards = [{t // 10 for t in (block_N == block).nonzero()[:, 0].tolist()} for block in block_N.unique()]
    return sum(len(touched) > 1 for touched in shards)


def on_flat_group() -> dict[str, float]:
    group = dist.group.WORLD
    assert group is not None
    return shard_errors([group], group.rank(), group.size())


def on_nested_groups() -> dict[str, dict[str, float]]:
    """Four shards over two groups of two (tensor x context parallel), summed one after the other."""
    rank = dist.get_rank()
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    single = [dist.new_group([r]) for r in range(4)][rank]
    row, column = rows[rank // 2], columns[rank % 2]
    only_row = sum_over([row])(torch.tensor(float(rank)))
    return {
        "flat": on_flat_group(),
        "nested": shard_errors([row, column], rank, 4),
        "one_of_two": {} if float(only_row) == (1.0 if rank < 2 else 5.0) else {"row": float(only_row)},
        "incomplete": shard_errors([row], rank, 4, ("fixed",)),
        "single_is_identity": {} if sum_over([single]) is no_reduce else {"identity": 1.0},
    }


def test_blocks_do_straddle_shards() -> None:
    assert straddling() == 3


def test_two_shards() -> None:
    assert run_ranks(on_flat_group, 2) == [{}, {}]


def test_four_shards_flat_and_nested() -> None:
    for rank in run_ranks(on_nested_groups, 4):
        incomplete = rank.pop("incomplete")
        assert not {name: errors for name, errors in rank.items() if errors}
        # The comparison can fail: leaving out one of the two groups is noticed.
        assert any("block_count" in name for name in incomplete)


def test_no_groups_is_the_identity() -> None:
    assert sum_over([]) is no_reduce


@pytest.mark.parametrize(
    ("index", "multiple", "expected", "real"),
    [
        ([4, 5, 6], 4, [4, 5, 6, 4], [True, True, True, False]),
        ([4, 5, 6], 2, [4, 5, 6, 4], [True, True, True, False]),
        ([4, 5], 2, [4, 5], [True, True]),
        ([9], 1, [9], [True]),
        ([9], 4, [9, 9, 9, 9], [True, False, False, False]),
        ([], 3, [0, 0, 0], [False, False, False]),
        ([], 1, [0], [False]),
    ],
)
def test_pad_to_multiple(index: list[int], multiple: int, expected: list[int], real: list[bool]) -> None:
    padded, is_real = pad_to_multiple(torch.tensor(index, dtype=torch.int64), multiple)
    assert padded.tolist() == expected
    assert is_real.tolist() == real
    assert padded.dtype == torch.int64


def test_statistics_of_no_tokens() -> None:
    """An empty micro-batch, as a rank without work sees it, adds nothing."""
    index_N, real_N = pad_to_multiple(torch.arange(0), 2)
    zeros_N = torch.zeros(len(index_N))
    everything = Segments(index_N, 1)
    result = Gate()(Signals(zeros_N, zeros_N, real_N, everything, everything))
    sums = drift_sums(result, real_N, torch.zeros(1, dtype=torch.int64), ROWS, owns_blocks=True)
    assert not any(values.any() for values in sums.values())
    assert drift_statistics(sums) == {}
