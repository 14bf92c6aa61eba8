"""`bpdg convert --verify-logits`: both sides agree on a probe text, and a wrong model is found out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_bpdg.checkpoint.convert import hf_to_megatron
from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.cli.app import app
from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.evaluation.logits import verify_logits
from tests.checkpoint_fixtures import save_tiny

TEXT = "every block drifts by itself"


def model(path: Path, model_type: str, *, tied: bool) -> Path:
    """Small weights: with those of size 1 every logit is in the hundreds and attention is one-hot."""
    save_tiny(path, model_type, tied=tied, num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor * 0.15 for name, tensor in tensors.items()}, path / "model.safetensors")
    build_char_tokenizer("abcdefghijklmnopqrstuvwxyz ").save_pretrained(path)
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_converted_models_agree(tmp_path: Path, model_type: str, tied: bool) -> None:
    hf = model(tmp_path / "hf", model_type, tied=tied)
    words = verify_logits(hf, hf_to_megatron(hf, tmp_path / "megatron"), TEXT)
    found = re.fullmatch(
        r"logits agree: largest .* logits up to (\S+) over (\d+) tokens; same first choice at (\d+)", words
    )
    assert found is not None, words
    largest, num_tokens, same = found.groups()
    assert int(num_tokens) == int(same) > 20
    assert float(largest) > 0.01, "logits near zero would agree whatever the model"


def test_command_agrees_and_disagrees(tmp_path: Path) -> None:
    hf = model(tmp_path / "hf", "qwen3", tied=False)
    run = CliRunner().invoke(
        app, ["convert", str(hf), str(tmp_path / "megatron"), "--verify-logits", TEXT], catch_exceptions=False
    )
    assert "logits agree: largest difference" in run.output
    # The same weights under another rotary base are another model.
    other = shutil.copytree(hf, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MappingError, match="HF transformers and Megatron-Core disagree: largest difference"):
        verify_logits(other, tmp_path / "megatron", TEXT)
    with pytest.raises(ValueError, match="the probe text '' has no tokens"):
        verify_logits(hf, tmp_path / "megatron", "")
