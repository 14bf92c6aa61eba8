"""Model sizes: the published table against transformers on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_bpdg.config.schema import Layout
from megatron_bpdg.models.qwen3 import SIZES, Qwen3Shape, check_layout, padded_vocab_size


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_transformers(name: str) -> None:
    shape = SIZES[name]
    fields = {field: getattr(shape, field) for field in shape.__dataclass_fields__ if field != "rope_theta"}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**fields))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_parameters / 1e9 == pytest.approx(float(name.rstrip("B")), rel=0.06)


def test_from_hf_reads_both_spellings_of_rope_theta() -> None:
    fields = {field: getattr(SIZES["4B"], field) for field in SIZES["4B"].__dataclass_fields__}
    old = dict(fields, rope_theta=5e6)
    new = {**fields, "rope_parameters": {"rope_theta": 5e6}}
    del new["rope_theta"]
    assert Qwen3Shape.from_hf(old) == Qwen3Shape.from_hf(new)
    assert Qwen3Shape.from_hf(new).rope_theta == 5e6
    del new["head_dim"]
    with pytest.raises(ValueError, match="head_dim"):
        Qwen3Shape.from_hf(new)


@pytest.mark.parametrize(("tp", "rows"), [(1, 151_936), (8, 151_936), (3, 151_938)])
def test_padded_vocabulary(tp: int, rows: int) -> None:
    assert padded_vocab_size(151_936, tp) == rows


def test_a_layout_that_does_not_divide_names_every_size() -> None:
    message = r"num_key_value_heads = 8; layout.pipeline_parallel: 3 .*num_hidden_layers = 28"
    with pytest.raises(ValueError, match=message):
        check_layout(SIZES["0.6B"], Layout(tensor_parallel=16, pipeline_parallel=3))
