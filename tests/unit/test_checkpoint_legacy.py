"""Reading Megatron's mp_rank files at every layout and spelling, against the HF model that they were cut from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.checkpoint.convert import hf_to_megatron, megatron_to_hf, verify_conversion
from megatron_bpdg.checkpoint.describe import describe
from megatron_bpdg.checkpoint.legacy import LegacyCheckpoint, is_legacy
from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint
from tests.checkpoint_fixtures import compare_hf, save_tiny
from tests.legacy_fixture import LegacyLayout, save_legacy

DENSE = [
    LegacyLayout(),
    LegacyLayout(tensor=2, spec="torch"),
    LegacyLayout(tensor=4, pipeline=2),
    LegacyLayout(pipeline=2, virtual=2, spec="torch"),
    LegacyLayout(pipeline=3),  # uneven: 1, 2 and 1 layers
]
MOE = [
    LegacyLayout(tensor=2, spec="torch"),
    LegacyLayout(expert=2),
    LegacyLayout(expert=4, pipeline=2, spec="torch"),
    LegacyLayout(tensor=2, expert=2, pipeline=2),
    LegacyLayout(tensor=2, expert=2, expert_tensor=1),
    LegacyLayout(tensor=2, expert=2, spec="te-fused-experts"),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_dense_layouts(tmp_path: Path, layout: LegacyLayout, tied: bool) -> None:
    hf = save_tiny(tmp_path / "hf", tied=tied, dtype=torch.bfloat16)
    legacy = save_legacy(hf, tmp_path / "legacy", layout, padded_rows=100)
    assert is_legacy(legacy)
    assert compare_hf(hf, megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)) == []
    assert verify_conversion(legacy, tmp_path / "back", hf_source=hf) == []


@pytest.mark.parametrize("layout", MOE, ids=str)
def test_expert_layouts(tmp_path: Path, layout: LegacyLayout) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False)
    legacy = save_legacy(hf, tmp_path / "legacy", layout, padded_rows=100)
    assert compare_hf(hf, megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)) == []
    sizes = LegacyCheckpoint(legacy).sizes
    assert (sizes["tensor"], sizes["expert"], sizes["expert_tensor"]) == (layout.tensor, layout.expert, layout.etp)


def test_biases_and_becoming_torch_dist(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen2", tied=True)
    legacy = save_legacy(hf, tmp_path / "legacy", LegacyLayout(tensor=2, pipeline=2))
    megatron = hf_to_megatron(legacy, tmp_path / "megatron", hf_source=hf)
    assert TorchDistCheckpoint(megatron).iteration is None
    assert compare_hf(hf, megatron_to_hf(megatron, tmp_path / "back")) == []


def test_what_it_holds(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", "qwen3_moe", tied=False, dtype=torch.bfloat16)
    legacy = save_legacy(hf, tmp_path / "legacy", LegacyLayout(tensor=2, expert=2))
    bare = describe(legacy)
    assert bare["model"] is None
    assert "no hf/config.json" in bare["complete"]
    (legacy / "hf").mkdir()
    (legacy / "hf" / "config.json").write_bytes((hf / "config.json").read_bytes())
    found = describe(legacy)
    assert (found["format"], found["iteration"], found["files"]) == ("mp_rank", 7, 4)
    assert found["layout"]["ranks"] == {"tensor": 2, "pipeline": 1, "expert": 2, "expert_tensor": 2}
    assert found["layout"]["optimizer"] is True
    assert found["complete"] is True
    assert found["parameters"] == describe(hf)["parameters"]


def test_a_tied_config_for_an_untied_model_is_refused(tmp_path: Path) -> None:
    untied = save_tiny(tmp_path / "untied", tied=False)
    tied = save_tiny(tmp_path / "tied", tied=True)
    legacy = save_legacy(untied, tmp_path / "legacy", LegacyLayout(tensor=2))
    with pytest.raises(MappingError, match=r"tie_word_embeddings true, but output_layer\.weight differs"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=tied)


def test_missing_ranks_and_misfits(tmp_path: Path) -> None:
    hf = save_tiny(tmp_path / "hf", tied=True, num_hidden_layers=2)
    other = save_tiny(tmp_path / "other", tied=True, num_hidden_layers=3, intermediate_size=40)
    legacy = save_legacy(hf, tmp_path / "legacy", LegacyLayout(tensor=2, pipeline=2))
    misfit = r"(?s)missing decoder.layers.2.*wrong .*linear_fc1.weight: shape \(48, 32\)"
    with pytest.raises(MappingError, match=misfit):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=other)
    file = legacy / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mp_rank_01_001 has no model_optim_rng\.pt"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)
    file.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="no file of rank tensor 1 pipeline 1"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "legacy", "other"]


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_files_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf = save_tiny(tmp_path / "hf", tied=True, num_hidden_layers=1)
    legacy = save_legacy(hf, tmp_path / "legacy", LegacyLayout())
    file = legacy / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"model": {"evil": _Evil()}}, file)
    with pytest.raises(ValueError, match="holds objects that are no tensors"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)
    file.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"not written by torch\.save"):
        megatron_to_hf(legacy, tmp_path / "back", hf_source=hf)
    assert not Path("evil-was-here").exists()
