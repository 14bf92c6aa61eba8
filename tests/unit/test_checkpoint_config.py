"""config.json: both spellings, every family, and every field mapped, known to change nothing, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.models.families import moe_layers
from megatron_bpdg.models.hf_config import hf_config_of, read_hf_config
from tests.checkpoint_fixtures import MODELS, TINY, TINY_MOE

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def write(path: Path, kind: str = "qwen3", /, **changes: Any) -> Path:
    """config.json as transformers 5 saves it, with changes; `...` takes a field out."""
    config, model = MODELS[kind]
    sizes = TINY_MOE if kind == "qwen3_moe" else TINY
    config(**sizes, architectures=[model.__name__]).save_pretrained(path)
    file = path / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    return path


@pytest.mark.parametrize("model_type", MODELS)
def test_what_transformers_saves_is_understood(tmp_path: Path, model_type: str) -> None:
    config = read_hf_config(write(tmp_path, model_type))
    assert config["rope_theta"] == 10_000.0
    assert config["rope_scaling"] is None
    assert config["head_dim"] == 12
    assert config["num_key_value_heads"] == 4


def test_transformers_5(tmp_path: Path) -> None:
    write(tmp_path, rope_parameters={"rope_theta": 5e6, "rope_type": "default"}, dtype="bfloat16")
    config = read_hf_config(tmp_path)
    assert (config["rope_theta"], config["dtype"], config["head_dim"]) == (5e6, "bfloat16", 12)


def test_transformers_4(tmp_path: Path) -> None:
    old = {"rope_parameters": ..., "dtype": ..., "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32"}
    write(tmp_path, **old, head_dim=...)
    config = read_hf_config(tmp_path / "config.json")
    assert (config["rope_theta"], config["dtype"], config["head_dim"]) == (1e6, "float32", 128)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": {**YARN, "rope_type": ..., "type": "yarn"}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}},
    ],
)
def test_yarn_in_all_spellings(tmp_path: Path, spelling: dict[str, Any]) -> None:
    for name, value in spelling.items():
        if isinstance(value, dict):
            spelling[name] = {key: entry for key, entry in value.items() if entry is not ...}
    config = read_hf_config(write(tmp_path, **spelling))
    assert config["rope_theta"] == 1e6
    assert config["rope_scaling"] == YARN


def test_yarn_defaults_to_the_models_own_length(tmp_path: Path) -> None:
    config = read_hf_config(write(tmp_path, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}))
    assert config["rope_scaling"]["original_max_position_embeddings"] == TINY["max_position_embeddings"]


def test_llama_defaults(tmp_path: Path) -> None:
    write(tmp_path, "llama", rope_parameters=..., num_key_value_heads=..., head_dim=..., num_attention_heads=4)
    config = read_hf_config(tmp_path)
    assert (config["rope_theta"], config["num_key_value_heads"], config["head_dim"]) == (10_000.0, 4, 8)


def test_experts(tmp_path: Path) -> None:
    config = read_hf_config(write(tmp_path, "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[3]))
    assert (config["num_experts"], config["norm_topk_prob"]) == (4, True)
    assert moe_layers(config) == (True, True, True, False, True, True)
    hub = write(tmp_path, "qwen3_moe", num_local_experts=..., num_experts=8, mlp_only_layers=..., norm_topk_prob=...)
    config = read_hf_config(hub)
    assert (config["num_experts"], config["norm_topk_prob"], config["mlp_only_layers"]) == (8, False, [])
    config = read_hf_config(write(tmp_path, "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2))
    assert moe_layers(config) == (False, True, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_next"}, r"model_type 'qwen3_next' is not supported \(supported: qwen3,"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"only 'Qwen3ForCausalLM'"),
        ({"attention_bias": True}, "attention_bias true is not supported, only false"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported, only "silu"'),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling of type 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "rope_parameters of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, r"rope_parameters\.factor is missing"),
        ({"rope_parameters": {**YARN, "long_factor": [1.0]}}, r"rope_parameters\.long_factor is not known"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor 0.5"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"layer_types": ["sliding_attention"]}, "layer_types sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* quantised checkpoints"),
        ({"logit_scale": 2.0, "num_experts": 4}, r"unknown field\(s\) logit_scale, num_experts"),
        ({"rope_parameters": None, "vocab_size": None}, "vocab_size is missing; rope_theta is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_hf_config(write(tmp_path, **changes))


def test_several_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention_bias .*; use_sliding_window .*; unknown field\(s\) mystery"):
        read_hf_config(write(tmp_path, attention_bias=True, use_sliding_window=True, mystery=1))


def test_experts_need_their_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moe_intermediate_size is missing; num_experts_per_tok is missing"):
        read_hf_config(write(tmp_path, "qwen3_moe", moe_intermediate_size=..., num_experts_per_tok=...))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json not found"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list"):
        read_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no hf/config\.json .*--hf-source"):
        hf_config_of(None, tmp_path)
