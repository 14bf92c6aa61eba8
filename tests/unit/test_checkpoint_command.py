"""`bpdg convert` and `bpdg inspect` as commands, and conversions shared by the ranks of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.mapping import LM_HEAD
from megatron_bpdg.checkpoint.source import Cast, is_exact
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_bpdg.cli.app import app
from tests.checkpoint_fixtures import compare_hf, save_tiny
from tests.dist_fixture import DistLayout, save_dist
from tests.legacy_fixture import LegacyLayout, save_legacy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bpdg(*args: object) -> str:
    """Run a command that should succeed; what it printed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_convert_both_ways_and_verify(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, dtype=torch.bfloat16)
    printed = bpdg("convert", hf, tmp_path / "megatron", "--verify", "--max-file-gb", 1e-5, "--workers", 3)
    assert "GB/s" in printed
    assert "survive the round trip" in printed
    bpdg("convert", tmp_path / "megatron", tmp_path / "back", "--verify")
    assert compare_hf(hf, tmp_path / "back") == []
    assert len(list((tmp_path / "megatron" / "release").glob("*.distcp"))) > 3


def test_verify_finds_what_a_broken_conversion_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns of every written projection change places."""
    from megatron_bpdg.checkpoint import convert

    write = convert.write_torch_dist

    def broken(step: Path, model: Any, *args: Any, **kwargs: Any) -> None:
        read = model.read

        def swapped(weight: Any) -> torch.Tensor:
            tensor = read(weight)
            return tensor.roll(1, -1) if weight.key.endswith("linear_proj.weight") else tensor

        model.read = swapped
        write(step, model, *args, **kwargs)

    monkeypatch.setattr(convert, "write_torch_dist", broken)
    hf = save_tiny(tmp_path / "hf", tied=False, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"(?s)not exact:\n  model\.layers\.0\.self_attn\.o_proj\.weight: .*layers\.1"):
        bpdg("convert", hf, tmp_path / "megatron", "--verify")


def test_legacy_files_can_become_either_format(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=True)
    legacy = save_legacy(hf, tmp_path / "legacy", LegacyLayout(tensor=2, pipeline=2))
    bpdg("convert", legacy, tmp_path / "back", "--hf-source", hf, "--verify")
    assert compare_hf(hf, tmp_path / "back") == []
    with pytest.raises(ValueError, match="not with mp_rank files"):
        bpdg("convert", legacy, tmp_path / "megatron", "--hf-source", hf, "--verify-logits", "1+1=")
    bpdg("convert", legacy, tmp_path / "megatron", "--to", "megatron", "--hf-source", hf, "--verify")
    assert compare_hf(hf, megatron_to_hf(tmp_path / "megatron", tmp_path / "again")) == []


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("hf", ["--to", "hf"], "hf is not a Megatron checkpoint"),
        ("megatron", ["--to", "megatron"], "is a Megatron checkpoint already"),
        ("hf", ["--to", "onnx"], "--to 'onnx' is not known; choose hf or megatron"),
        ("hf", ["--dtype", "int8"], "--dtype 'int8' is not known; choose float32, bfloat16, float16"),
        ("hf", ["--hf-source", "hf"], "--hf-source is for Megatron checkpoints"),
        ("nothing", [], "nothing is not a directory"),
    ],
)
def test_wrong_directions_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("hf"), tied=True, num_hidden_layers=1)
    hf_to_megatron("hf", "megatron")
    with pytest.raises((ValueError, OSError), match=message):
        bpdg("convert", source, "target", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_a_widening_cast_is_exact_and_goes_back(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=False, dtype=torch.bfloat16)
    assert "bfloat16 to float32: exact" in bpdg("convert", hf, tmp_path / "wide", "--dtype", "float32", "--verify")
    assert json.loads((tmp_path / "wide" / "hf" / "config.json").read_text())["dtype"] == "float32"
    printed = bpdg("convert", tmp_path / "wide", tmp_path / "back", "--dtype", "bfloat16", "--verify")
    assert "float32 to bfloat16: rounded to nearest, 0 of" in printed
    assert compare_hf(hf, tmp_path / "back") == []


def test_a_narrowing_cast_says_what_it_changed(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=False)
    tensors = load_file(hf / "model.safetensors")
    changed = sum(int((tensor.bfloat16().float() != tensor).sum()) for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values())
    printed = bpdg("convert", hf, tmp_path / "narrow", "--dtype", "bfloat16", "--verify")
    assert f"{changed} of {total} values changed" in printed
    back = megatron_to_hf(tmp_path / "narrow", tmp_path / "back")
    for name, tensor in load_file(back / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name].bfloat16())


def test_mixed_dtypes_can_be_cast(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=False)
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, hf / "model.safetensors")
    with pytest.raises(ValueError, match=r"different dtypes \(cast with --dtype\).*k_proj"):
        bpdg("convert", hf, tmp_path / "megatron")
    bpdg("convert", hf, tmp_path / "megatron", "--dtype", "float32", "--verify")


def test_a_cast_refuses_to_overflow() -> None:
    with pytest.raises(ValueError, match=r"w: 1 of 3 values are too large for float16 \(largest 6\.55e\+04\)"):
        Cast(torch.float16)(torch.tensor([1.0, 1e6, torch.inf]), "w")


def test_which_casts_are_exact() -> None:
    exact = {(a, b) for a in FLOATS for b in FLOATS if is_exact(a, b)}
    f32, bf16, f16 = FLOATS
    assert exact == {(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f16, f32)}


def inspected(path: Path) -> dict[str, Any]:
    return dict(json.loads(bpdg("inspect", path, "--json")))


def test_inspect_hf(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, dtype=torch.bfloat16, max_shard_size=4000)
    found = inspected(hf)
    sizes = [size for _, size in HFCheckpoint(hf).stored_sizes]
    assert (found["format"], found["iteration"], found["complete"]) == ("hf", None, True)
    assert found["dtypes"] == {"bfloat16": {"tensors": len(sizes), "bytes": sum(sizes)}}
    assert found["parameters"] == sum(sizes) // 2
    assert found["layout"]["shards"] == found["files"] == len(list(hf.glob("*.safetensors")))
    assert found["model"]["num_experts"] == 4
    table = bpdg("inspect", hf)
    assert f"{sum(sizes) // 2:,}" in table
    assert "yes: every tensor of the config" in table


def test_inspect_torch_dist(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=True)
    found = inspected(hf_to_megatron(hf, tmp_path / "megatron"))
    assert (found["format"], found["iteration"], found["complete"]) == ("torch_dist", "release", True)
    assert found["layout"] == {"layers": "stacked", "saved_at": {"tensor": 1, "pipeline": 1}, "optimizer": False}
    assert found["parameters"] == inspected(hf)["parameters"]
    other = inspected(save_dist(hf, tmp_path / "other", DistLayout(2, keys="layer")))
    assert (other["iteration"], other["layout"]["layers"]) == (3, "one key per layer")
    assert other["parameters"] is None


def test_inspect_tells_what_is_missing(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=False)
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_haed.weight"] = tensors.pop(LM_HEAD)
    save_file(tensors, hf / "model.safetensors")
    assert "missing lm_head.weight (nearest: lm_haed.weight)" in inspected(hf)["complete"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        bpdg("inspect", tmp_path / "nowhere")


def test_truncated_data_is_told_before_anything_is_written(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=False)
    megatron = hf_to_megatron(hf, tmp_path / "megatron", options=Options(max_file_size=20_000))
    file = sorted((megatron / "release").glob("*.distcp"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated: {len(whole) - 100} bytes"):
        megatron_to_hf(megatron, tmp_path / "back")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names files that are absent: {file.name}"):
        TorchDistCheckpoint(megatron)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_torchrun_shares_the_files(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen3_moe", tied=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_bpdg.cli", "convert", str(hf), str(tmp_path / "target"), "--max-file-gb", "1e-5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--verify"], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("survive the round trip") == 1
    assert len(list((tmp_path / "target").glob("release/*.distcp"))) > 3
    assert compare_hf(hf, megatron_to_hf(tmp_path / "target", tmp_path / "back")) == []
