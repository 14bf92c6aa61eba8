"""config.json: both spellings, every family, and every field mapped, known to change nothing, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bpdg.models.families import moe_layers
from megatron_bpdg.models.hf_config import hf_config_of, read_hf_config
from megatron_bpdg.models.rope import frequencies
from megatron_bpdg.models.shape import ModelShape
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
        ({"is_causal": False}, "is_causal false is not supported, only true"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        *(({"mystery": off}, r"unknown field\(s\) mystery") for off in (False, None, 0, "", [], {})),
        ({"_mystery": 1}, r"unknown field\(s\) _mystery"),
        ({"rope_parameters": {"full_attention": {**YARN}, "rope_theta": 1e6}}, r"full_attention is not known for type"),
        ({"rope_parameters": None, "vocab_size": None}, "vocab_size is missing; rope_theta is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_hf_config(write(tmp_path, **changes))


OLD = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e4}, r"rope_theta 10000\.0 and rope_parameters\.rope_theta 1000000\.0 differ"),
        ({"rope_scaling": YARN}, "differ in factor, original_max_position_embeddings, rope_theta, rope_type"),
        ({"rope_theta": 1e6, "rope_scaling": {**YARN, "rope_type": None, "type": "yarn"}}, "differ in factor"),
        (
            {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**OLD, "rope_theta": 1e6}},
            "differ in factor",
        ),
        # transformers would take the base from neither section here.
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN}, "differ in rope_theta: keep one"),
        (
            {
                "rope_parameters": {**YARN, "rope_theta": 1e6},
                "rope_scaling": {**YARN, "rope_theta": 1e6, "beta_fast": 8},
            },
            "beta_fast",
        ),
        (
            {"rope_parameters": {**YARN, "rope_theta": 1e6}, "original_max_position_embeddings": 2048},
            "2048 and rope_param",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "type": "yarn", "rope_theta": 1e6}},
            'types, "default" and "yarn"',
        ),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, 'dtype "float32" and torch_dtype "bfloat16" are two names'),
    ],
)
def test_spellings_that_contradict_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match=message):
        read_hf_config(write(tmp_path, **{**base, **changes}))


def test_the_same_in_two_spellings(tmp_path: Path) -> None:
    both = {**YARN, "rope_theta": 1e6}
    old = {"type": "yarn", **{name: value for name, value in both.items() if name != "rope_type"}}
    write(tmp_path, rope_parameters=both, rope_scaling=old, rope_theta=1e6, dtype="float32", torch_dtype="float32")
    config = read_hf_config(tmp_path)
    assert (config["rope_scaling"], config["rope_theta"]) == (YARN, 1e6)
    assert read_hf_config(write(tmp_path, rope_scaling={}, num_local_experts=...))["rope_scaling"] is None


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 1e4}, {"rope_scaling": None}, {"rope_scaling": {**YARN, "rope_theta": 1e4}}]
)
def test_what_is_understood_is_what_transformers_builds(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Frequencies of the rotary embedding, for one section or the other beside the base at the top."""
    write(
        tmp_path, rope_parameters=... if "rope_scaling" in rope else {"rope_type": "default", "rope_theta": 1e4}, **rope
    )
    file = tmp_path / "config.json"
    if rope.get("rope_scaling", 0) is None:
        file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 1e4}))
    embedding = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    shape = ModelShape.from_hf(read_hf_config(tmp_path))
    ours = shape.rope_scaling or Plain()
    torch.testing.assert_close(embedding.inv_freq.float(), ours.frequencies(shape.head_dim, shape.rope_theta))
    assert float(embedding.attention_scaling) == pytest.approx(ours.attention)


class Plain:
    attention = 1.0
    frequencies = staticmethod(frequencies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": "1e-6"}, r'rms_norm_eps "1e-6" should be a number above 0'),
        ({"num_hidden_layers": "2"}, 'num_hidden_layers "2" should be a whole number above 0'),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers 2.0 should be a whole number"),
        ({"hidden_size": True}, "hidden_size true should be a whole number"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}}, r'rope_parameters\.rope_theta "1e6"'),
        ({"rope_parameters": {**YARN, "factor": float("inf")}}, r"rope_parameters\.factor Infinity"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\] should be an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings "false" should be true or false'),
        ({"layer_types": "full_attention"}, "layer_types .* should be a list"),
        ({"model_type": ["qwen3"]}, "model_type .* should be a text"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
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
