"""Safetensors directories: what is read, what is refused, and that what is written is what others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bpdg.checkpoint.hf import INDEX_FILE, HFCheckpoint, TensorPlan, plan_shards, write_hf_common, write_shard
from megatron_bpdg.checkpoint.mapping import HF_EMBEDDING, LM_HEAD, MappingError
from tests.checkpoint_fixtures import save_tiny_qwen3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_qwen3(tmp_path / "model", tied=False, num_hidden_layers=1)


def test_reads_slices_of_sharded_files(tmp_path: Path) -> None:
    path = save_tiny_qwen3(tmp_path / "model", tied=False, max_shard_size="20KB")
    assert (path / INDEX_FILE).is_file()
    source = HFCheckpoint(path)
    source.check()
    whole = source.read("model.layers.2.mlp.down_proj.weight")
    assert torch.equal(source.read("model.layers.2.mlp.down_proj.weight", 1, 12, 6), whole[:, 12:18])
    assert torch.equal(source.read("model.layers.2.mlp.down_proj.weight", 0, 3, 2), whole[3:5])
    assert source.read(LM_HEAD, 0, 98, 0).shape == (0, 32)
    assert sum(size for _, size in source.stored_sizes) == sum(
        load_file(file)[name].nbytes for file in path.glob("*.safetensors") for name in load_file(file)
    )


def test_tied_model_with_a_head_must_repeat_the_embedding(tmp_path: Path) -> None:
    path = save_tiny_qwen3(tmp_path / "model", tied=True)
    assert not HFCheckpoint(path).has_lm_head
    tensors = load_file(path / "model.safetensors")
    tensors[LM_HEAD] = tensors[HF_EMBEDDING].clone()
    save_file(tensors, path / "model.safetensors")
    source = HFCheckpoint(path)
    source.check()
    assert source.mapping.tied
    assert source.has_lm_head
    tensors[LM_HEAD][97, 31] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(MappingError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        HFCheckpoint(path).check()


def test_broken_directories(tmp_path: Path, model: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory"):
        HFCheckpoint(tmp_path / "absent")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="truncated"):
        HFCheckpoint(model)
    (model / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip archive, not safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        HFCheckpoint(model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"convert the \.bin weights"):
        HFCheckpoint(model)
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"absent: model-1.safetensors"):
        HFCheckpoint(model)
    save_file({"b": torch.zeros(2)}, model / "model-1.safetensors")
    with pytest.raises(MappingError, match=r"(?s)b is in model-1.safetensors.*a is not in model-1.safetensors"):
        HFCheckpoint(model)
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, model / "model-1.safetensors")
    with pytest.raises(ValueError, match="unsupported dtype I8 of a;"):
        HFCheckpoint(model)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "invalid JSON in header"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "missing field `data_offsets`"),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, "expected a sequence"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "invalid shape, data type, or offset"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}, "invalid shape, data type, or offset"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "invalid offset for tensor `a`"),
        (
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},  # one upon the other
            "invalid offset for tensor",
        ),
        ({}, "file not fully covered"),
    ],
)
def test_broken_headers(model: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=f"model.safetensors is truncated, damaged or not a.*{message}"):
        HFCheckpoint(model)


def test_writer_spreads_and_aligns(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3).bfloat16(),  # 6 bytes: what follows must be aligned all the same
        "b": torch.randn(2, 2),
        "c": torch.randn(5).half(),
        "empty": torch.randn(0, 4),
    }
    plan = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_shards(plan, max_shard_size=25)
    stream = iter(tensors.items())
    for shard in shards:
        write_shard(tmp_path, shard, stream)
        _, offsets = shard.layout()
        assert all(offsets[tensor.name] % tensor.dtype.itemsize == 0 for tensor in shard.tensors)
    write_hf_common(tmp_path, shards, tmp_path, None)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 32
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
        "empty": "model-00002-of-00002.safetensors",
    }
    read = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    (shard,) = plan_shards([TensorPlan("a", (2,), torch.float32), TensorPlan("b", (2,), torch.float32)])
    good = ("a", torch.zeros(2))
    for second in (("a", torch.zeros(2)), ("c", torch.zeros(2)), ("b", torch.zeros(2).half()), ("b", torch.zeros(3))):
        with pytest.raises(MappingError, match=rf"'{second[0]}'.* came in place of .*'b', shape=\(2,\), dtype=.*32"):
            write_shard(tmp_path, shard, iter([good, second]))
    with pytest.raises(MappingError, match=r"nothing came in place of .*'b'"):
        write_shard(tmp_path, shard, iter([good]))
    with pytest.raises(ValueError, match="a is planned twice"):
        plan_shards([shard.tensors[0], shard.tensors[0]])
    with pytest.raises(ValueError, match=r"dtype torch\.int64 cannot be written"):
        plan_shards([TensorPlan("a", (2,), torch.int64)])
