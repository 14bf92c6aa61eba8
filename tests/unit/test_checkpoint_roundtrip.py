"""Byte-exact round trips of random small models through every format and layout."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf, verify_conversion
from tests.checkpoint_fixtures import compare_hf, save_tiny
from tests.dist_fixture import DistLayout, save_dist
from tests.legacy_fixture import LegacyLayout, save_legacy


@dataclass(frozen=True)
class Example:
    """A small model and how its checkpoints are laid out."""

    model_type: str
    tied: bool
    dtype: torch.dtype
    fields: dict[str, Any]
    shard_size: int
    padded_rows: int
    dist: DistLayout
    legacy: LegacyLayout


@st.composite
def examples(draw: st.DrawFn) -> Example:
    model_type = draw(st.sampled_from(["qwen3", "qwen3_moe", "qwen2", "llama"]))
    tp = draw(st.sampled_from([1, 2, 4]))
    ep = draw(st.sampled_from([1, 2, 4])) if model_type == "qwen3_moe" else 1
    etp = draw(st.sampled_from([1, tp])) if model_type == "qwen3_moe" else tp
    # Fewer groups than tensor-parallel ranks too: their rows then cut through a group.
    groups, per_group = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    vocab = draw(st.integers(1, 40))
    fields: dict[str, Any] = {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * per_group,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "intermediate_size": 4 * draw(st.integers(1, 3)),
    }
    if model_type in ("qwen2", "llama"):
        fields["hidden_size"] = 4 * groups * per_group
    else:
        fields |= {"hidden_size": 8, "head_dim": draw(st.sampled_from([4, 8]))}
    if model_type == "qwen3_moe":
        fields |= {
            "num_experts": 4,
            "moe_intermediate_size": 4 * draw(st.integers(1, 3)),
            "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        }
    mixed = bool(fields.get("mlp_only_layers"))
    keys = ["layer", "singleton"] if mixed else ["stacked", "layer", "singleton"]
    specs = ["te", "torch", "te-fused-experts"] if model_type == "qwen3_moe" else ["te", "torch"]
    pipeline = draw(st.integers(1, layers))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 and layers >= 2 * pipeline else 1
    return Example(
        model_type=model_type,
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        fields=fields,
        shard_size=draw(st.sampled_from([300, 4000, 10**9])),
        padded_rows=-(-vocab // 8) * 8 + draw(st.sampled_from([0, 8])),
        dist=DistLayout(tp, etp, draw(st.sampled_from(keys)), fused_norms=draw(st.booleans())),
        legacy=LegacyLayout(tp, pipeline, virtual, ep, etp, draw(st.sampled_from(specs))),
    )


@settings(max_examples=80)
@given(examples())
def test_every_format_and_layout_is_byte_exact(example: Example) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        hf = save_tiny(
            work / "hf",
            example.model_type,
            tied=example.tied,
            dtype=example.dtype,
            max_shard_size=example.shard_size,
            **example.fields,
        )
        options = Options(max_file_size=example.shard_size, memory=500)
        megatron = hf_to_megatron(hf, work / "megatron", options=options)
        back = megatron_to_hf(megatron, work / "back", options=options)
        assert compare_hf(hf, back) == []
        assert verify_conversion(hf, megatron) == []
        assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()

        saved = save_dist(hf, work / "saved", example.dist, padded_rows=example.padded_rows)
        assert compare_hf(hf, megatron_to_hf(saved, work / "from-saved", hf_source=hf)) == []

        legacy = save_legacy(hf, work / "legacy", example.legacy, padded_rows=example.padded_rows)
        assert compare_hf(hf, megatron_to_hf(legacy, work / "from-legacy", hf_source=hf)) == []
        again = hf_to_megatron(legacy, work / "legacy-as-dist", hf_source=hf)
        assert verify_conversion(hf, again) == []
        names = {"hf", "megatron", "back", "saved", "from-saved", "legacy", "from-legacy", "legacy-as-dist"}
        assert {path.name for path in work.iterdir()} == names, "leftovers"


def test_a_wrong_bit_anywhere_is_seen() -> None:
    """The comparison itself: one bit of one expert, in a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        hf = save_tiny(work / "hf", "qwen3_moe", tied=False)
        megatron = hf_to_megatron(hf, work / "megatron", options=Options(max_file_size=1))
        assert verify_conversion(hf, megatron) == []
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        from safetensors.torch import load_file, save_file

        tensors = load_file(hf / "model.safetensors")
        tensors[name].view(torch.int32)[3, 4] ^= 1
        save_file(tensors, hf / "model.safetensors")
        assert verify_conversion(hf, megatron) == [f"{name}: 1 of 640 elements differ"]
