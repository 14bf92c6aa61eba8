"""Offline conversions: what is kept bit for bit, foreign layouts of torch_dist, dtypes, and errors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from megatron_bpdg.checkpoint import files
from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf, verify_conversion
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.mapping import HF_EMBEDDING, LM_HEAD, MappingError
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint, stacked_key
from tests.checkpoint_fixtures import compare_hf, save_tiny_qwen3


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_tiny_qwen3(tmp_path / "hf", tied=False, num_hidden_layers=2)


def test_bits_survive(hf: Path, tmp_path: Path) -> None:
    """NaN payloads, infinities, negative zero and subnormals of bfloat16."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    patterns = torch.tensor([0x7FC1, -0x003F, 0x7F80, -0x0080, -0x8000, 0x0001], dtype=torch.int16)
    for tensor in tensors.values():
        tensor.view(-1)[:6] = patterns.view(torch.bfloat16)
    save_file(tensors, hf / "model.safetensors")
    back = megatron_to_hf(hf_to_megatron(hf, tmp_path / "megatron"), tmp_path / "back")
    assert compare_hf(hf, back) == []
    assert load_file(back / "model.safetensors")[LM_HEAD].view(-1)[:6].view(torch.int16).tolist() == patterns.tolist()


def test_a_tied_head_comes_back_exactly_if_it_was_there(tmp_path: Path) -> None:
    source = save_tiny_qwen3(tmp_path / "hf", tied=True)
    without = megatron_to_hf(hf_to_megatron(source, tmp_path / "m1"), tmp_path / "b1")
    assert not HFCheckpoint(without).has_lm_head
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {LM_HEAD: tensors[HF_EMBEDDING].clone()}, source / "model.safetensors")
    back = megatron_to_hf(hf_to_megatron(source, tmp_path / "m2"), tmp_path / "b2")
    assert compare_hf(source, back) == []
    assert HFCheckpoint(back).has_lm_head


def test_transformers_loads_the_result_and_sidecars_follow(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.json").write_text("{}")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"
    source = json.loads((megatron / "hf" / "bpdg_source.json").read_text())
    assert source == {"has_lm_head": True, "vocab_size": 98, "dtype": "float32", "format": 1}
    back = megatron_to_hf(megatron, tmp_path / "back", options=Options(dtype=torch.bfloat16))
    assert (back / "tokenizer.json").read_text() == "{}"
    assert (back / "chat_template.jinja").is_file()
    assert not (back / "bpdg_source.json").exists()
    model = Qwen3ForCausalLM.from_pretrained(back)
    assert model.dtype == torch.bfloat16
    expected = load_file(hf / "model.safetensors")
    assert torch.equal(model.lm_head.weight, expected[LM_HEAD].bfloat16())


def test_layers_are_stacked_in_megatrons_layout(hf: Path, tmp_path: Path) -> None:
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    metadata = TorchDistCheckpoint(megatron)._metadata.state_dict_metadata
    qkv = metadata["decoder.layers.self_attention.linear_qkv.weight"]
    assert tuple(qkv.size) == (2, 16 * 12, 32)
    assert tuple(metadata["embedding.word_embeddings.weight"].size) == (98, 32)
    # Plain DCP reads it, with no code of ours.
    fc1 = torch.empty(2, 96, 32)
    dcp.load({"decoder.layers.mlp.linear_fc1.weight": fc1}, checkpoint_id=megatron / "release", no_dist=True)
    expected = load_file(hf / "model.safetensors")
    assert torch.equal(fc1[1, :48], expected["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(fc1[1, 48:], expected["model.layers.1.mlp.up_proj.weight"])


def _foreign(hf: Path, path: Path, *, split_gate: bool = False, **changes: Any) -> Path:
    """A training checkpoint as another program may save it: one key per layer, optimizer state, no hf folder."""
    source = HFCheckpoint(hf)
    state: dict[str, Any] = {}
    for weight in source.mapping.weights:
        full = weight.hf_to_megatron([source.read(name) for name in weight.hf_names])
        if split_gate and weight.key.endswith("linear_fc1.weight"):
            state[f"{weight.key}_w"], state[f"{weight.key}_v"] = full.chunk(2)
        else:
            state[weight.key] = full
        state[f"optimizer.state.exp_avg.{stacked_key(weight, source.mapping)[0]}"] = torch.zeros(2)
        state["chained_0.optimizer.state.exp_avg.x"] = torch.zeros(2)
    (path / "iter_0000012").mkdir(parents=True)
    dcp.save(state | changes, checkpoint_id=path / "iter_0000012", no_dist=True)
    (path / "latest_checkpointed_iteration.txt").write_text("12\n")
    return path


@pytest.mark.parametrize("split_gate", [False, True])
def test_one_key_per_layer_is_read_too(hf: Path, tmp_path: Path, split_gate: bool) -> None:
    foreign = _foreign(hf, tmp_path / "foreign", split_gate=split_gate)
    with pytest.raises(FileNotFoundError, match="--hf-source"):
        megatron_to_hf(foreign, tmp_path / "back")
    assert compare_hf(hf, megatron_to_hf(foreign, tmp_path / "back", hf_source=hf)) == []
    step = megatron_to_hf(foreign / "iter_0000012", tmp_path / "step", hf_source=hf)
    assert compare_hf(hf, step) == []


def test_tensors_that_do_not_belong_raise(hf: Path, tmp_path: Path) -> None:
    foreign = _foreign(hf, tmp_path / "foreign", **{"mtp.layers.0.eh_proj.weight": torch.zeros(2)})
    with pytest.raises(MappingError, match=r"surplus mtp.layers.0.eh_proj.weight"):
        megatron_to_hf(foreign, tmp_path / "back", hf_source=hf)
    assert not (tmp_path / "back").exists()


def test_every_misfit_is_listed_before_anything_is_written(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_projection.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(32, 95)
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(MappingError, match=r"\(2 missing, 1 surplus, 1 wrong\)") as raised:
        hf_to_megatron(hf, tmp_path / "megatron")
    for line in (
        "missing model.norm.weight",
        "missing model.layers.0.mlp.up_proj.weight (nearest: model.layers.0.mlp.up_projection.weight)",
        "surplus model.layers.0.mlp.up_projection.weight",
        "wrong   model.layers.1.self_attn.o_proj.weight: shape (32, 95), expected (32, 96)",
    ):
        assert line in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_unsupported_architecture_stops_the_conversion(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"model_type 'mamba' is not supported \(supported: qwen3, qwen3_moe"):
        hf_to_megatron(hf, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_mixed_dtypes_are_refused_not_promoted(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, hf / "model.safetensors")
    with pytest.raises(MappingError, match=r"k_proj.weight torch.bfloat16"):
        hf_to_megatron(hf, tmp_path / "megatron")
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, hf / "model.safetensors")
    with pytest.raises(MappingError, match=r"layers.1.self_attention.k_layernorm.weight is torch.bfloat16"):
        hf_to_megatron(hf, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_destinations(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = tmp_path / "megatron"
    destination.mkdir()
    hf_to_megatron(hf, destination)  # an empty directory is free
    (destination / "mark").touch()
    with pytest.raises(FileExistsError, match="megatron exists"):
        hf_to_megatron(hf, destination)
    hf_to_megatron(hf, destination, options=Options(overwrite=True))
    assert not (destination / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(1))
    with pytest.raises(OSError, match="not enough disk space"):
        hf_to_megatron(hf, tmp_path / "other")


def test_a_source_is_never_overwritten(hf: Path, tmp_path: Path) -> None:
    megatron = hf_to_megatron(hf, tmp_path / "work" / "megatron")
    for source, target in ((hf, hf), (megatron, megatron), (megatron, megatron.parent), (megatron, megatron / "hf")):
        convert = hf_to_megatron if source == hf else megatron_to_hf
        with pytest.raises(ValueError, match="which the conversion reads: choose another destination"):
            convert(source, target, options=Options(overwrite=True))
    assert compare_hf(hf, megatron_to_hf(megatron, tmp_path / "back")) == []


def test_a_failure_midway_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = HFCheckpoint.read

    def failing(self: HFCheckpoint, name: str, *args: Any) -> torch.Tensor:
        if "layers.1.mlp.down_proj" in name:
            raise OSError("disk fell out")
        return read(self, name, *args)

    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "old").touch()
    monkeypatch.setattr(HFCheckpoint, "read", failing)
    with pytest.raises(OSError, match="disk fell out"):
        hf_to_megatron(hf, tmp_path / "megatron", options=Options(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    assert (tmp_path / "megatron" / "old").exists()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_metadata_cannot_run_code(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match="does not belong in checkpoint metadata"):
        megatron_to_hf(megatron, tmp_path / "back")
    assert not Path("evil-was-here").exists()


def test_damaged_metadata_is_told(hf: Path, tmp_path: Path) -> None:
    file = hf_to_megatron(hf, tmp_path / "megatron") / "release" / ".metadata"
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], bytes(100), b"\x85" + whole, pickle.dumps({"a": 1})):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is not checkpoint metadata"):
            TorchDistCheckpoint(tmp_path / "megatron")


def test_trackers(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Megatron checkpoint"):
        TorchDistCheckpoint(hf)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("3")
    with pytest.raises(FileNotFoundError, match=r"iter_0000003, which does not exist"):
        TorchDistCheckpoint(tmp_path)
    (tmp_path / "iter_0000003").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the step is .*iter_0000003, which has no \.metadata"):
        TorchDistCheckpoint(tmp_path)
    tracker.write_text("latest")
    with pytest.raises(ValueError, match="holds 'latest'"):
        TorchDistCheckpoint(tmp_path)


def test_verification_lists_every_difference(hf: Path, tmp_path: Path) -> None:
    other = save_tiny_qwen3(tmp_path / "other", tied=False, num_hidden_layers=2)
    assert verify_conversion(hf, other) == compare_hf(hf, other) == []
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][:3] += 1
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].bfloat16()
    save_file(tensors, other / "model.safetensors")
    expected = {
        "model.layers.0.mlp.down_proj.weight": "dtype torch.float32 and torch.bfloat16",
        "model.norm.weight": "3 of 32 elements differ",
    }
    assert verify_conversion(hf, other) == [f"{name}: {what}" for name, what in expected.items()]
    assert compare_hf(hf, other) == list(expected)
    larger = save_tiny_qwen3(tmp_path / "larger", tied=False, num_hidden_layers=2, intermediate_size=49)
    shapes = [line for line in verify_conversion(hf, larger) if ": shape " in line]
    assert "model.layers.1.mlp.up_proj.weight: shape (48, 32) and (49, 32)" in shapes
    assert len(shapes) == 6
    deeper = save_tiny_qwen3(tmp_path / "deeper", tied=True, num_hidden_layers=3)
    lines = verify_conversion(hf, deeper)
    assert lines[0] == f"lm_head.weight: only in {hf}"
    assert f"model.layers.2.mlp.up_proj.weight: only in {deeper}" in lines
    assert len(lines) == 1 + 11


def test_tools_convert_both_ways_without_megatron(hf: Path, tmp_path: Path) -> None:
    """As scripts, in fresh interpreters where Megatron-Core cannot be imported."""
    root = Path(__file__).parents[2]

    def run(tool: str, *args: Path | str) -> subprocess.CompletedProcess[str]:
        block = f"import sys, runpy; sys.modules['megatron'] = None; sys.path.insert(0, {str(root)!r}); "
        script = f"sys.argv[0] = {tool!r}; runpy.run_path({str(root / 'tools' / tool)!r}, run_name='__main__')"
        command = [sys.executable, "-c", block + script, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    to_megatron = run("convert_hf_to_megatron.py", hf, tmp_path / "megatron")
    assert to_megatron.returncode == 0, to_megatron.stderr
    to_hf = run("convert_megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back", "--verify")
    assert to_hf.returncode == 0, to_hf.stderr
    assert "survive the round trip" in to_hf.stderr
    assert compare_hf(hf, tmp_path / "back") == []
    refused = run("convert_hf_to_megatron.py", hf, tmp_path / "megatron")
    assert refused.returncode == 1
    assert "error: " in refused.stderr
    assert "Traceback" not in refused.stderr
