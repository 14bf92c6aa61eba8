"""Model sizes: configs against transformers on the meta device, and what layouts have to divide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.rope import Yarn
from megatron_bpdg.models.shape import Experts, ModelShape, check_layout, padded_vocab_size
from tests.published import SIZES

SMALL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def hf_config(folder: Path, kind: str, **fields: Any) -> dict[str, Any]:
    """A config that transformers wrote, read back."""
    AutoConfig.for_model(kind, **(SMALL | fields)).save_pretrained(folder)
    return read_hf_config(folder)


def hf_num_parameters(kind: str, fields: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3", {}),
        ("qwen3_moe", SMALL_EXPERTS),
        ("qwen3_moe", SMALL_EXPERTS | {"mlp_only_layers": [1]}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {}),
    ],
)
def test_shapes_of_configs(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    config = hf_config(tmp_path, kind, **fields)
    shape = ModelShape.from_hf(config)
    assert mapping_for(config).num_parameters == hf_num_parameters(kind, SMALL | fields)
    assert shape.qk_norm == kind.startswith("qwen3")
    assert shape.qkv_bias == (kind == "qwen2")
    assert (shape.experts is not None) == (kind == "qwen3_moe")


def test_experts_and_rotary_scaling_of_a_config(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 64}
    fields = SMALL_EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": False, "rope_parameters": rope}
    shape = ModelShape.from_hf(hf_config(tmp_path, "qwen3_moe", **fields))
    assert shape.experts == Experts(4, 2, 24, norm_topk_prob=False, dense_layers=(0, 2))
    assert shape.rope_theta == 5e6
    assert shape.rope_scaling == Yarn(4.0, 64)


def test_configs_that_cannot_be_built_are_refused_by_name(tmp_path: Path) -> None:
    config = hf_config(tmp_path, "qwen3_moe", **SMALL_EXPERTS)
    with pytest.raises(ValueError, match=r"config\.json has no head_dim"):
        ModelShape.from_hf(config | {"head_dim": None})
    with pytest.raises(ValueError, match="num_experts_per_tok = 5 exceeds num_experts = 4"):
        ModelShape.from_hf(config | {"num_experts_per_tok": 5})
    with pytest.raises(ValueError, match="num_experts_per_tok = 1 with norm_topk_prob"):
        ModelShape.from_hf(config | {"num_experts_per_tok": 1})
    assert ModelShape.from_hf(config | {"decoder_sparse_step": 4}).experts is None


@pytest.mark.parametrize(("tp", "rows"), [(1, 151_936), (8, 151_936), (3, 151_938)])
def test_padded_vocabulary(tp: int, rows: int) -> None:
    assert padded_vocab_size(151_936, tp) == rows


def test_a_layout_that_does_not_divide_names_every_size() -> None:
    message = r"num_key_value_heads = 8; layout.pipeline_parallel: 3 .*num_hidden_layers = 28"
    with pytest.raises(ValueError, match=message):
        check_layout(SIZES["0.6B"], Layout(tensor_parallel=16, pipeline_parallel=3))


def test_layouts_of_experts() -> None:
    shape = SIZES["30B-A3B"]
    check_layout(shape, Layout(tensor_parallel=4, sequence_parallel=True, data_parallel=16, expert_parallel=64))
    message = r"expert_parallel: 3 does not divide num_experts = 128; layout.expert_tensor_parallel: 5 .*_size = 768"
    with pytest.raises(ValueError, match=message):
        check_layout(shape, Layout(data_parallel=15, expert_parallel=3, expert_tensor_parallel=5))
    with pytest.raises(ValueError, match=r"tensor_parallel: 2 with experts needs layout\.sequence_parallel: true"):
        check_layout(shape, Layout(tensor_parallel=2))
    check_layout(SIZES["0.6B"], Layout(tensor_parallel=2, expert_parallel=2))  # a dense model beside one with experts


def test_experts_are_spread_over_tensor_and_data_parallel_ranks() -> None:
    layout = Layout(tensor_parallel=2, data_parallel=3, expert_parallel=3, expert_tensor_parallel=2)
    assert layout.world_size == 6
    with pytest.raises(ValidationError, match=r"2 x 2 = 4 must divide .* = 2 x 1 x 3 = 6"):
        Layout(tensor_parallel=2, data_parallel=3, expert_parallel=2, expert_tensor_parallel=2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_dim", 15, "head_dim = 15 must be even"),
        ("num_key_value_heads", 3, "num_key_value_heads = 3 must divide num_attention_heads = 16"),
    ],
)
def test_sizes_that_no_model_can_have(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SIZES["0.6B"], **{field: value})
