"""Every published Qwen3, without its weights: our table against HF transformers' own model on the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.checkpoint.patterns import Expert
from megatron_bpdg.checkpoint.torch_dist_writer import megatron_args
from megatron_bpdg.models.hf_config import read_hf_config
from tests.published import SIZES

# Parameters of each release, a tied embedding counted once.
PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}


def model_and_config(name: str, folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """transformers' model on the meta device, and its config.json as we read it."""
    shape = SIZES[name]
    derived = ("experts", "rope_scaling", "qk_norm", "qkv_bias")
    fields = {field: getattr(shape, field) for field in shape.__dataclass_fields__ if field not in derived}
    with torch.device("meta"):
        if shape.experts:
            experts = {
                "num_experts": shape.experts.num_experts,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": shape.experts.moe_intermediate_size,
            }
            model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, **experts, norm_topk_prob=True))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**fields))
    model.config.save_pretrained(folder)
    return model, read_hf_config(folder)


def hub_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes as checkpoints have them: transformers 5 fuses experts in memory and saves them one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
        if fused is None:
            shapes[name] = tuple(parameter.shape)
            continue
        prefix, kind = fused.groups()
        experts, rows, columns = parameter.shape
        for e in range(experts):
            if kind == "down_proj":
                shapes[f"{prefix}.{e}.down_proj.weight"] = (rows, columns)
            else:
                for half in ("gate", "up"):
                    shapes[f"{prefix}.{e}.{half}_proj.weight"] = (rows // 2, columns)
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_equals_transformers(name: str, tmp_path: Path) -> None:
    model, config = model_and_config(name, tmp_path)
    mapping = mapping_for(config)
    assert mapping.hf_tensors() == hub_shapes(model)
    assert mapping.num_parameters == PUBLISHED[name] == sum(parameter.numel() for parameter in model.parameters())
    args = megatron_args(config)
    assert (args.kv_channels, args.num_layers, getattr(args, "num_experts", 0)) == (
        128,
        len(mapping.moe_layers),
        config.get("num_experts", 0),
    )


@pytest.mark.parametrize(
    ("name", "tp", "ep", "etp"), [("4B", 8, 1, 1), ("32B", 8, 1, 1), ("30B-A3B", 4, 8, 1), ("235B-A22B", 4, 16, 4)]
)
def test_usual_layouts_divide(name: str, tp: int, ep: int, etp: int, tmp_path: Path) -> None:
    """Every rank's parts of a published model add up to the model."""
    _, config = model_and_config(name, tmp_path)
    total = dict.fromkeys(range(ep), 0)
    for weight in mapping_for(config).weights:
        if isinstance(weight, Expert):
            total[weight.ep_rank(ep)] += etp * torch.Size(weight.shard_shape(etp)).numel()
        elif weight.tp_dim is not None:
            total[0] += tp * torch.Size(weight.shard_shape(tp)).numel()
        else:
            total[0] += torch.Size(weight.megatron_shape).numel()
    assert sum(total.values()) == PUBLISHED[name]
