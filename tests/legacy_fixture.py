"""Megatron `mp_rank` checkpoints cut from an HF model, as Megatron-LM's `torch` format lays them out."""

from __future__ import annotations

import enum
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.mapping import EMBEDDING, OUTPUT_LAYER, mapping_for
from megatron_bpdg.checkpoint.patterns import Expert


class ModelType(enum.Enum):
    """One of the classes that a training checkpoint's arguments mention."""

    encoder_or_decoder = 1


@dataclass(frozen=True)
class LegacyLayout:
    """Model-parallel sizes of the files."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    # "te", "te-fused-experts" (one matrix for all experts of a rank) or "torch"
    spec: str = "te"

    @property
    def etp(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor


def save_legacy(hf: Path, path: Path, layout: LegacyLayout, *, padded_rows: int | None = None) -> Path:
    """Write `hf` as iteration 7 under `path`, with the other things that a training run leaves in such files."""
    source = HFCheckpoint(hf)
    mapping = mapping_for(source.config, padded_rows)
    full = {w.key: w.hf_to_megatron([source.read(name) for name in w.hf_names]) for w in mapping.weights}
    num_layers = source.config["num_hidden_layers"]
    stages = layout.pipeline * layout.virtual
    bounds = [round(i * num_layers / stages) for i in range(stages + 1)]
    step = path / "iter_0000007"
    for t in range(layout.tensor):
        for p in range(layout.pipeline):
            for e in range(layout.expert):
                if layout.expert > 1 and layout.etp == 1 and t % layout.expert != e % layout.tensor:
                    continue  # with whole experts, tensor ranks are among the expert-parallel ones
                chunks = []
                for v in range(layout.virtual):
                    stage = v * layout.pipeline + p
                    chunk: dict[str, Any] = {}
                    for weight in mapping.weights:
                        key = weight.key
                        if isinstance(weight, Expert):
                            if weight.ep_rank(layout.expert) != e:
                                continue
                            shard = weight.shard(full[key], t if layout.etp > 1 else 0, layout.etp)
                        else:
                            shard = weight.shard(full[key], t, layout.tensor)
                        layer = int(key.split(".")[2]) if key.startswith("decoder.layers.") else None
                        if layer is not None:
                            if not bounds[stage] <= layer < bounds[stage + 1]:
                                continue
                            key = key.replace(f"layers.{layer}.", f"layers.{layer - bounds[stage]}.")
                        elif (key == EMBEDDING and stage > 0) or (key != EMBEDDING and stage < stages - 1):
                            continue
                        chunk[_local_name(key, weight, layout)] = shard.clone()
                    if mapping.tied and stage == stages - 1 and stages > 1:
                        chunk[OUTPUT_LAYER] = mapping.by_key[EMBEDDING].shard(full[EMBEDDING], t, layout.tensor).clone()
                    chunk["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
                    chunks.append(_fuse_experts(chunk) if layout.spec == "te-fused-experts" else chunk)
                name = f"mp_rank_{t:02d}"
                name += f"_{p:03d}" if layout.pipeline > 1 else ""
                name += f"_{e:03d}" if layout.expert > 1 else ""
                (step / name).mkdir(parents=True)
                models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": c for i, c in enumerate(chunks)}
                torch.save(
                    {
                        "args": Namespace(
                            tensor_model_parallel_size=layout.tensor,
                            pipeline_model_parallel_size=layout.pipeline,
                            expert_model_parallel_size=layout.expert,
                            expert_tensor_parallel_size=layout.etp,
                            num_experts=source.config.get("num_experts"),
                            model_type=ModelType.encoder_or_decoder,
                            params_dtype=torch.bfloat16,
                        ),
                        "iteration": 7,
                        "checkpoint_version": 3.0,
                        "optimizer": {"exp_avg": torch.zeros(3), "kind": ModelType.encoder_or_decoder},
                        "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state()}],
                        **models,
                    },
                    step / name / "model_optim_rng.pt",
                )
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return path


def _local_name(key: str, weight: Any, layout: LegacyLayout) -> str:
    if isinstance(weight, Expert):
        prefix, _, suffix = key.partition(f"experts.experts.{weight.expert}.")
        local = weight.expert % (weight.num_experts // layout.expert)
        if layout.spec == "torch":
            return f"{prefix}experts.local_experts.{local}.{suffix}"
        return f"{prefix}experts.{suffix}{local}"
    if layout.spec == "torch":
        key = key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return key


def _fuse_experts(chunk: dict[str, Any]) -> dict[str, Any]:
    """``linear_fc1.weight{e}`` [2F, H] of the local experts as ``weight1``, whose memory is [e, H, 2F]; fc2 alike."""
    fused: dict[str, list[torch.Tensor]] = {}
    rest = {}
    for name, tensor in chunk.items():
        prefix, found, local = name.partition("experts.linear_fc")
        if found:
            fused.setdefault(f"{prefix}experts.weight{local[0]}", []).append(tensor)
        else:
            rest[name] = tensor
    for name, experts in fused.items():
        stacked = torch.stack([expert.t() for expert in experts]).contiguous()
        width = stacked.shape[1] if name.endswith("1") else stacked.shape[2]
        rest[name] = stacked.view(width, -1) if name.endswith("1") else stacked.view(-1, width)
    return rest
