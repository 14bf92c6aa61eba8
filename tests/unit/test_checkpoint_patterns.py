"""Each layout against row orders worked out by hand, and its laws on random sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_bpdg.checkpoint.patterns import (
    QKV,
    ColumnParallel,
    ExpertGatedMLP,
    ExpertRowParallel,
    GatedMLP,
    Replicated,
    RowParallel,
    VocabRows,
    Weight,
    owned,
)


def labelled(prefix: int, rows: int, columns: int) -> Tensor:
    """Entry = prefix * 100 + row * 10 + column."""
    return torch.tensor([[prefix * 100 + r * 10 + c for c in range(columns)] for r in range(rows)], dtype=torch.int32)


def first_column(tensor: Tensor) -> list[int]:
    return tensor[:, 0].tolist()


def test_replicated_is_whole_on_every_rank() -> None:
    weight = Replicated("norm", ("n",), ((3,),))
    norm = torch.tensor([1.0, 2.0, 3.0])
    assert weight.hf_to_megatron([norm]) is norm
    assert [weight.shard(norm, rank, 4).tolist() for rank in range(4)] == [[1.0, 2.0, 3.0]] * 4
    assert weight.unshard([norm, norm]).tolist() == [1.0, 2.0, 3.0]


def test_column_parallel_divides_rows() -> None:
    weight = ColumnParallel("fc", ("w",), ((4, 2),))
    shard = weight.shard(labelled(1, 4, 2), 1, 2)
    assert shard.tolist() == [[120, 121], [130, 131]]


def test_row_parallel_divides_columns() -> None:
    weight = RowParallel("proj", ("w",), ((2, 4),))
    shard = weight.shard(labelled(1, 2, 4), 1, 2)
    assert shard.tolist() == [[102, 103], [112, 113]]


def test_vocabulary_rows_are_padded_with_zeros_and_cut() -> None:
    weight = VocabRows("embedding", ("e",), ((5, 2),), padded_rows=8)
    hf = labelled(1, 5, 2)
    full = weight.hf_to_megatron([hf])
    assert first_column(full) == [100, 110, 120, 130, 140, 0, 0, 0]
    assert [first_column(weight.shard(full, rank, 4)) for rank in range(4)] == [
        [100, 110],
        [120, 130],
        [140, 0],
        [0, 0],
    ]
    assert weight.split(full)["e"].tolist() == hf.tolist()


def test_qkv_rows_go_by_query_group() -> None:
    # 4 query heads, 2 groups, head size 2: group 0 holds query heads 0 and 1, then its key, then its value.
    weight = QKV("qkv", ("q", "k", "v"), ((8, 1), (4, 1), (4, 1)), head_dim=2)
    q, k, v = labelled(1, 8, 1), labelled(2, 4, 1), labelled(3, 4, 1)
    full = weight.hf_to_megatron([q, k, v])
    group_0 = [100, 110, 120, 130, 200, 210, 300, 310]
    group_1 = [140, 150, 160, 170, 220, 230, 320, 330]
    assert first_column(full) == group_0 + group_1
    assert first_column(weight.shard(full, 0, 2)) == group_0
    assert first_column(weight.shard(full, 1, 2)) == group_1
    # More ranks than groups: plain rows.
    assert first_column(weight.shard(full, 1, 4)) == [200, 210, 300, 310]


def test_qkv_takes_biases_too() -> None:
    weight = QKV("qkv.bias", ("q", "k", "v"), ((4,), (2,), (2,)), head_dim=1)
    parts = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8])]
    assert weight.hf_to_megatron(parts).tolist() == [1, 2, 5, 7, 3, 4, 6, 8]


def test_gated_mlp_ranks_hold_their_gate_then_their_up() -> None:
    weight = GatedMLP("fc1", ("gate", "up"), ((4, 1), (4, 1)))
    full = weight.hf_to_megatron([labelled(1, 4, 1), labelled(2, 4, 1)])
    assert first_column(full) == [100, 110, 120, 130, 200, 210, 220, 230]
    shards = [weight.shard(full, rank, 2) for rank in range(2)]
    assert [first_column(shard) for shard in shards] == [[100, 110, 200, 210], [120, 130, 220, 230]]
    assert first_column(weight.unshard(shards)) == first_column(full)


def test_experts_are_cut_over_their_own_tensor_ranks_and_placed_by_index() -> None:
    fc1 = ExpertGatedMLP("fc1", ("gate", "up"), ((4, 1), (4, 1)), expert=5, num_experts=8)
    full = fc1.hf_to_megatron([labelled(1, 4, 1), labelled(2, 4, 1)])
    assert [first_column(fc1.shard(full, rank, 2)) for rank in range(2)] == [[100, 110, 200, 210], [120, 130, 220, 230]]
    fc2 = ExpertRowParallel("fc2", ("down",), ((2, 4),), expert=5, num_experts=8)
    assert fc2.shard(labelled(1, 2, 4), 1, 2).tolist() == [[102, 103], [112, 113]]
    # 8 experts on 4 ranks: 0 1 | 2 3 | 4 5 | 6 7.
    assert fc1.ep_rank(4) == 2
    with pytest.raises(ValueError, match="fc2: expert-parallel size 3 does not divide 8 experts"):
        fc2.ep_rank(3)


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    small = st.integers(1, 3)
    kind = draw(st.sampled_from(["replicated", "column", "row", "vocab", "qkv", "gated", "expert-fc1", "expert-fc2"]))
    rows, columns = 4 * draw(small), 4 * draw(small)
    if kind == "vocab":
        true_rows = draw(st.integers(1, rows))
        return VocabRows("w", ("a",), ((true_rows, columns),), padded_rows=rows)
    if kind == "qkv":
        groups, per_group, head_dim = draw(st.sampled_from([1, 2, 4])), draw(small), 4 * draw(small)
        shapes = ((groups * per_group * head_dim, columns), (groups * head_dim, columns), (groups * head_dim, columns))
        return QKV("w", ("a", "b", "c"), shapes, head_dim=head_dim)
    if kind == "gated":
        return GatedMLP("w", ("a", "b"), ((rows, columns), (rows, columns)))
    if kind == "expert-fc1":
        return ExpertGatedMLP("w", ("a", "b"), ((rows, columns), (rows, columns)), expert=1, num_experts=4)
    if kind == "expert-fc2":
        return ExpertRowParallel("w", ("a",), ((rows, columns),), expert=1, num_experts=4)
    single = {"replicated": Replicated, "column": ColumnParallel, "row": RowParallel}[kind]
    return single("w", ("a",), ((rows, columns),))


@settings(max_examples=80, deadline=None)
@given(weight=weights(), tp_size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_laws(weight: Weight, tp_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hf = {
        name: torch.randn(shape, generator=generator)
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    }
    full = weight.hf_to_megatron(list(hf.values()))
    assert tuple(full.shape) == weight.megatron_shape
    assert weight.accepts(tuple(full.shape))
    shards = [weight.shard(full, rank, tp_size) for rank in range(tp_size)]
    assert {tuple(shard.shape) for shard in shards} == {weight.shard_shape(tp_size)}
    assert torch.equal(weight.unshard(shards), full)
    back = {name: owned(part) for name, part in weight.split(full).items()}
    assert list(back) == list(hf)
    for name, tensor in hf.items():
        assert torch.equal(back[name], tensor)
        assert back[name].untyped_storage().nbytes() == tensor.nbytes

    def read(name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        return hf[name] if dim is None else hf[name].narrow(dim, start, length or 0)

    for rank, shard in enumerate(shards):
        assert torch.equal(weight.read_shard(read, rank, tp_size), shard)


def test_reading_a_shard_reads_no_more_than_it_needs() -> None:
    asked: list[tuple[str, int | None, int, int | None]] = []

    def read(name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        asked.append((name, dim, start, length))
        return torch.zeros(length or 0, 1)

    QKV("qkv", ("q", "k", "v"), ((8, 1), (4, 1), (4, 1)), head_dim=2).read_shard(read, 1, 2)
    VocabRows("e", ("e",), ((5, 1),), padded_rows=8).read_shard(read, 2, 4)
    assert asked == [("q", 0, 4, 4), ("k", 0, 2, 2), ("v", 0, 2, 2), ("e", 0, 4, 1)]


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fc1: tensor-parallel size 3 does not divide 4"):
        GatedMLP("fc1", ("g", "u"), ((4, 1), (4, 1))).shard(torch.zeros(8, 1), 0, 3)
    with pytest.raises(ValueError, match="padded vocabulary 4 is smaller than the true 5"):
        VocabRows("e", ("e",), ((5, 1),), padded_rows=4)
    with pytest.raises(ValueError, match="q 6, k 4, v 4 do not make groups of heads of 2"):
        QKV("qkv", ("q", "k", "v"), ((6, 1), (4, 1), (4, 1)), head_dim=2)
