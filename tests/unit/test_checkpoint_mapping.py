"""The weight tables: names, order, tied and untied side by side, and errors that list everything."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bpdg.checkpoint.mapping import (
    EMBEDDING,
    LM_HEAD,
    OUTPUT_LAYER,
    MappingError,
    ModelMapping,
    mapping_for,
)
from megatron_bpdg.checkpoint.patterns import QKV, Expert
from tests.checkpoint_fixtures import TINY, TINY_MOE


def config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3", "tie_word_embeddings": False, **TINY, **changes}


def found(mapping: ModelMapping) -> dict[str, tuple[int, ...]]:
    return dict(mapping.hf_tensors())


def test_names_of_one_layer() -> None:
    mapping = mapping_for(config())
    layer = {w.key: w.hf_names for w in mapping.weights if ".layers.2." in w.key}
    hf, mg = "model.layers.2", "decoder.layers.2"
    assert layer == {
        f"{mg}.self_attention.linear_qkv.layer_norm_weight": (f"{hf}.input_layernorm.weight",),
        f"{mg}.self_attention.linear_qkv.weight": tuple(f"{hf}.self_attn.{p}_proj.weight" for p in "qkv"),
        f"{mg}.self_attention.q_layernorm.weight": (f"{hf}.self_attn.q_norm.weight",),
        f"{mg}.self_attention.k_layernorm.weight": (f"{hf}.self_attn.k_norm.weight",),
        f"{mg}.self_attention.linear_proj.weight": (f"{hf}.self_attn.o_proj.weight",),
        f"{mg}.mlp.linear_fc1.layer_norm_weight": (f"{hf}.post_attention_layernorm.weight",),
        f"{mg}.mlp.linear_fc1.weight": (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
        f"{mg}.mlp.linear_fc2.weight": (f"{hf}.mlp.down_proj.weight",),
    }


def test_head_size_comes_from_the_config() -> None:
    qkv = mapping_for(config()).by_key["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert isinstance(qkv, QKV)
    assert qkv.megatron_shape == ((8 + 2 * 4) * 12, 32)


def test_a_tied_model_does_not_touch_the_untied_one_beside_it() -> None:
    before = mapping_for(config(tie_word_embeddings=False))
    tied = mapping_for(config(tie_word_embeddings=True))
    after = mapping_for(config(tie_word_embeddings=False))
    for untied in (before, after):
        assert untied.by_key[OUTPUT_LAYER].hf_names == (LM_HEAD,)
        assert untied.weight_for(OUTPUT_LAYER).hf_names == (LM_HEAD,)
    assert OUTPUT_LAYER not in tied.by_key
    assert tied.weight_for(OUTPUT_LAYER).key == EMBEDDING


def test_torch_only_spec_names_are_translated() -> None:
    mapping = mapping_for(config())
    stored = [mapping.canonical(f"decoder.layers.3.{name}.weight") for name in ("input_layernorm", "pre_mlp_layernorm")]
    assert stored == [
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    ]
    for weight in mapping.weights:
        assert mapping.canonical(weight.key) == weight.key


def test_one_error_lists_missing_surplus_and_misshapen_with_nearest_names() -> None:
    mapping = mapping_for(config())
    tensors = found(mapping)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.gate_projection.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.bias"] = (96,)
    tensors["model.layers.2.self_attn.o_proj.weight"] = (96, 32)
    with pytest.raises(MappingError) as raised:
        mapping.check_hf(tensors, "somewhere")
    text = str(raised.value)
    assert "somewhere" in text
    assert "2 missing, 2 surplus, 1 wrong" in text
    assert "missing model.norm.weight" in text
    assert "missing model.layers.1.mlp.gate_proj.weight (nearest: model.layers.1.mlp.gate_projection.weight)" in text
    assert "surplus model.layers.0.self_attn.q_proj.bias" in text
    assert "wrong   model.layers.2.self_attn.o_proj.weight: shape (96, 32), expected (32, 96)" in text


def test_untied_needs_a_head_and_tied_may_have_one() -> None:
    untied, tied = mapping_for(config()), mapping_for(config(tie_word_embeddings=True))
    tensors = found(untied)
    tied.check_hf(tensors, "tied with a head")
    del tensors[LM_HEAD]
    tied.check_hf(tensors, "tied without")
    with pytest.raises(MappingError, match=r"missing lm_head\.weight"):
        untied.check_hf(tensors, "untied without")


def test_stored_vocabulary_may_be_padded_but_not_short() -> None:
    mapping = mapping_for(config())
    shapes = {weight.key: weight.megatron_shape for weight in mapping.weights}
    mapping.check_megatron(shapes | {EMBEDDING: (128, 32), OUTPUT_LAYER: (100, 32)}, "padded")
    with pytest.raises(MappingError, match=r"wrong   embedding.*shape \(97, 32\)"):
        mapping.check_megatron(shapes | {EMBEDDING: (97, 32)}, "short")


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match=r"model_type 'mamba' has no weight mapping; supported: qwen3, "):
        mapping_for(config(model_type="mamba"))


def moe_config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", "tie_word_embeddings": False, **TINY_MOE, **changes}


def test_names_of_a_layer_with_experts() -> None:
    mapping = mapping_for(moe_config(num_experts=2))
    hf, mg = "model.layers.1", "decoder.layers.1"
    layer = {
        w.key: w.hf_names for w in mapping.weights if w.key.startswith(f"{mg}.") and ".self_attention." not in w.key
    }
    expected: dict[str, tuple[str, ...]] = {
        f"{mg}.pre_mlp_layernorm.weight": (f"{hf}.post_attention_layernorm.weight",),
        f"{mg}.mlp.router.weight": (f"{hf}.mlp.gate.weight",),
    }
    for e in range(2):
        source, target = f"{hf}.mlp.experts.{e}", f"{mg}.mlp.experts.experts.{e}"
        expected[f"{target}.linear_fc1.weight"] = (f"{source}.gate_proj.weight", f"{source}.up_proj.weight")
        expected[f"{target}.linear_fc2.weight"] = (f"{source}.down_proj.weight",)
    assert layer == expected
    assert mapping.homogeneous


@pytest.mark.parametrize(
    ("name", "first_expert", "key"),
    [
        ("mlp.experts.linear_fc1.weight0", 0, "mlp.experts.experts.0.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight11", 8, "mlp.experts.experts.19.linear_fc2.weight"),
        ("mlp.experts.local_experts.1.linear_fc2.weight", 2, "mlp.experts.experts.3.linear_fc2.weight"),
        ("input_layernorm.weight", 0, "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", 0, "pre_mlp_layernorm.weight"),
        ("mlp.router.weight", 0, "mlp.router.weight"),
    ],
)
def test_names_of_both_specs_and_both_kinds_of_experts(name: str, first_expert: int, key: str) -> None:
    mapping = mapping_for(moe_config())
    assert mapping.canonical(f"decoder.layers.1.{name}", first_expert) == f"decoder.layers.1.{key}"


def test_mixed_layers_translate_layer_by_layer() -> None:
    mapping = mapping_for(moe_config(mlp_only_layers=[1]))
    assert mapping.moe_layers == (True, False)
    assert not mapping.homogeneous
    names = [mapping.canonical(f"decoder.layers.{i}.pre_mlp_layernorm.weight") for i in range(2)]
    assert names == ["decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"]
    assert all(name in mapping.by_key for name in names)


def test_where_experts_live() -> None:
    weight = mapping_for(moe_config()).by_key["decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight"]
    assert isinstance(weight, Expert)
    assert (weight.expert, weight.num_experts) == (3, 4)
    assert [weight.ep_rank(size) for size in (1, 2, 4)] == [0, 1, 3]


def test_qwen2_has_biases_and_llama_has_neither_biases_nor_norms() -> None:
    attention = "decoder.layers.0.self_attention"
    sizes = {name: size for name, size in TINY.items() if name != "head_dim"} | {"head_dim": 4}
    qwen2 = mapping_for({"model_type": "qwen2", "tie_word_embeddings": True, **sizes})
    bias = qwen2.by_key[f"{attention}.linear_qkv.bias"]
    assert bias.hf_names == tuple(f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv")
    assert bias.megatron_shape == (16 * 4,)
    llama = mapping_for({"model_type": "llama", "tie_word_embeddings": False, **sizes})
    assert f"{attention}.linear_qkv.bias" not in llama.by_key
    for mapping in (qwen2, llama):
        assert f"{attention}.q_layernorm.weight" not in mapping.by_key


def test_experts_fused_in_one_tensor_are_told_apart_from_missing_ones() -> None:
    mapping = mapping_for(moe_config())
    shapes = {name: shape for name, shape in found(mapping).items() if ".experts." not in name}
    for i in range(2):
        shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (4, 40, 32)
        shapes[f"model.layers.{i}.mlp.experts.down_proj"] = (4, 32, 20)
    with pytest.raises(MappingError, match=r"layers\.0\.mlp\.experts\.gate_up_proj and 1 more .* save_pretrained"):
        mapping.check_hf(shapes, "a saved state dict")
