"""Which HF tensors make which Megatron-Core tensors, one table per model family.

Tables are built afresh for every config and never stored on a class or module: a tied model must not be able to change
the mapping of an untied one that lives beside it (the usual pair in distillation).

To add a family of the same shape, see `models/families.py`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from megatron_bpdg.checkpoint.patterns import (
    QKV,
    ExpertGatedMLP,
    ExpertRowParallel,
    GatedMLP,
    Replicated,
    RowParallel,
    Shape,
    VocabRows,
    Weight,
)
from megatron_bpdg.models.families import FAMILIES, Family, moe_layers

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LM_HEAD = "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Parameter of an expert in a grouped MLP (one module, a weight per expert) and in a sequence of MLPs.
_LOCAL_EXPERT = re.compile(
    r"mlp\.experts\.(?:(?P<grouped>linear_fc[12])\.weight(?P<i>\d+)"
    r"|local_experts\.(?P<j>\d+)\.(?P<sequential>linear_fc[12])\.weight)$"
)
# Suffix in the torch-only spec -> suffix in the Transformer Engine spec, which fuses a norm into the linear after it.
_ALIASES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Nearest-name search is quadratic; the names themselves are always listed in full.
_MAX_SUGGESTIONS = 40


class MappingError(ValueError):
    """The tensors of a checkpoint or model are not those that its config asks for."""


@dataclass(frozen=True)
class ModelMapping:
    """All weights of one model, in the fixed order in which they are written and streamed.

    Attributes:
        weights: one entry per Megatron tensor, experts one by one; for a tied model the output layer is not among them.
        tied: whether the output layer shares the embedding.
        moe_layers: for each layer, whether it has experts.
    """

    weights: tuple[Weight, ...]
    tied: bool
    moe_layers: tuple[bool, ...]

    @cached_property
    def by_key(self) -> dict[str, Weight]:
        return {weight.key: weight for weight in self.weights}

    @property
    def homogeneous(self) -> bool:
        """Whether all layers have the same tensors, and are therefore stored stacked."""
        return len(set(self.moe_layers)) <= 1

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, the tied embedding counted once, padding not."""
        return sum(math.prod(shape) for shape in self.hf_tensors().values())

    def canonical(self, name: str, first_expert: int = 0) -> str:
        """Key of a parameter of either layer spec.

        Args:
            name: parameter name, already with its global layer index; grouped and sequential experts are known.
            first_expert: what is added to the expert's index on its rank: ``E / ep_size * ep_rank``.
        """
        layer = LAYER.match(name)
        has_experts = layer is not None and self.moe_layers[int(layer.group(1)) :][:1] == (True,)
        return canonical_name(name, has_experts=has_experts, first_expert=first_expert)

    def weight_for(self, key: str) -> Weight:
        """Entry of a canonical key; a tied model's output layer, where it has a copy of it, is the embedding's."""
        return self.by_key[EMBEDDING if self.tied and key == OUTPUT_LAYER else key]

    def hf_shapes(self, weight: Weight, lm_head: bool = False) -> dict[str, Shape]:
        """Names and shapes of the HF tensors of one weight; `lm_head` adds a tied model's redundant head."""
        shapes = dict(zip(weight.hf_names, weight.hf_shapes, strict=True))
        if lm_head and self.tied and weight.key == EMBEDDING:
            shapes[LM_HEAD] = shapes[HF_EMBEDDING]
        return shapes

    def hf_parts(self, weight: Weight, full: Tensor, lm_head: bool = False) -> dict[str, Tensor]:
        """The HF tensors of one full Megatron tensor, views of it where the layout allows, under those names."""
        parts = weight.split(full)
        if lm_head and self.tied and weight.key == EMBEDDING:
            parts[LM_HEAD] = parts[HF_EMBEDDING]
        return parts

    def hf_tensors(self, lm_head: bool = False) -> dict[str, Shape]:
        """Names and shapes of the whole HF checkpoint; see `hf_shapes`."""
        shapes = (self.hf_shapes(weight, lm_head) for weight in self.weights)
        return {name: shape for tensors in shapes for name, shape in tensors.items()}

    def check_hf(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise MappingError, listing every problem, unless `found` is exactly this model's HF checkpoint.

        A tied model may carry `lm_head.weight` or not.
        """
        if fused := [name for name in found if name.endswith(".mlp.experts.gate_up_proj")]:
            raise MappingError(
                f"{where}: {fused[0]} and {len(fused) - 1} more hold all experts in one tensor, as transformers keeps "
                "them in memory; save the model with save_pretrained, which writes them one by one"
            )
        expected = self.hf_tensors(lm_head=LM_HEAD in found)
        wrong = {
            name: f"shape {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        }
        raise_on_mismatch(expected, found, wrong, where)

    def check_megatron(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise MappingError, listing every problem, unless `found` (full shapes) is exactly this model's tensors."""
        wrong = {
            key: f"shape {found[key]}, expected {weight.megatron_shape}"
            for key, weight in self.by_key.items()
            if key in found and not weight.accepts(found[key])
        }
        raise_on_mismatch(self.by_key, found, wrong, where)


def canonical_name(name: str, *, has_experts: bool, first_expert: int = 0) -> str:
    """`ModelMapping.canonical` for one whose model is not known yet; `has_experts` says it of the name's layer."""
    if expert := _LOCAL_EXPERT.search(name):
        linear = expert["grouped"] or expert["sequential"]
        index = first_expert + int(expert["i"] or expert["j"])
        return f"{name[: expert.start()]}mlp.experts.experts.{index}.{linear}.weight"
    layer = LAYER.match(name)
    suffix = name[layer.end() :] if layer else name
    # The norm before experts is a module of its own in both specs.
    if layer is None or suffix not in _ALIASES or (has_experts and suffix == "pre_mlp_layernorm.weight"):
        return name
    return layer.group() + _ALIASES[suffix]


def raise_on_mismatch(expected: Iterable[str], found: Iterable[str], wrong: Mapping[str, str], where: str) -> None:
    """Raise one MappingError with all missing, surplus and wrong names, each with its nearest counterpart."""
    expected_names, found_names = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [name for name in expected_names if name not in found_names]
    surplus = [name for name in found_names if name not in expected_names]
    if not (missing or surplus or wrong):
        return

    def nearest(name: str, pool: list[str]) -> str:
        match = difflib.get_close_matches(name, pool, n=1, cutoff=0.6)
        return f" (nearest: {match[0]})" if match else ""

    lines = []
    for title, names, pool in (("missing", missing, surplus), ("surplus", surplus, missing or list(expected_names))):
        lines += [
            f"  {title} {name}{nearest(name, pool) if number < _MAX_SUGGESTIONS else ''}"
            for number, name in enumerate(names)
        ]
    lines += [f"  wrong   {name}: {problem}" for name, problem in wrong.items()]
    counts = f"{len(missing)} missing, {len(surplus)} surplus, {len(wrong)} wrong"
    raise MappingError(f"{where}: tensors do not fit the model's config ({counts})\n" + "\n".join(lines))


def mapping_for(config: Mapping[str, Any], padded_vocab_size: int | None = None) -> ModelMapping:
    """The table of the model that an HF config (see `read_hf_config`) describes.

    Args:
        config: normalised config.json.
        padded_vocab_size: vocabulary rows of the Megatron model over all ranks; None: the true vocabulary.

    Raises:
        ValueError: for a model family without a table.
    """
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise ValueError(f"model_type {config['model_type']!r} has no weight mapping; supported: {', '.join(FAMILIES)}")
    H, V = config["hidden_size"], config["vocab_size"]
    tied = bool(config["tie_word_embeddings"])
    moe = moe_layers(config)
    weights: list[Weight] = [VocabRows(EMBEDDING, (HF_EMBEDDING,), ((V, H),), padded_vocab_size)]
    for i, has_experts in enumerate(moe):
        hf, mg = f"model.layers.{i}", f"decoder.layers.{i}"
        weights += _attention(hf, mg, config, family)
        weights += _experts(hf, mg, config) if has_experts else _dense_mlp(hf, mg, config)
    weights.append(Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), ((H,),)))
    if not tied:
        weights.append(VocabRows(OUTPUT_LAYER, (LM_HEAD,), ((V, H),), padded_vocab_size))
    return ModelMapping(tuple(weights), tied, moe)


def _attention(hf: str, mg: str, config: Mapping[str, Any], family: Family) -> list[Weight]:
    H, D = config["hidden_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    hf, attention, norm = f"{hf}.self_attn", f"{mg}.self_attention", f"{hf}.input_layernorm.weight"
    weights: list[Weight] = [Replicated(f"{attention}.linear_qkv.layer_norm_weight", (norm,), ((H,),))]
    for kind, columns in (("weight", (H,)), *([("bias", ())] if family.qkv_bias else [])):
        names = tuple(f"{hf}.{part}_proj.{kind}" for part in "qkv")
        shapes = tuple((rows, *columns) for rows in (q_rows, kv_rows, kv_rows))
        weights.append(QKV(f"{attention}.linear_qkv.{kind}", names, shapes, D))
    if family.qk_norm:
        weights += [
            Replicated(f"{attention}.{part}_layernorm.weight", (f"{hf}.{part}_norm.weight",), ((D,),)) for part in "qk"
        ]
    weights.append(RowParallel(f"{attention}.linear_proj.weight", (f"{hf}.o_proj.weight",), ((H, q_rows),)))
    return weights


def _gate_up(hf: str) -> tuple[str, str]:
    return f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"


def _dense_mlp(hf: str, mg: str, config: Mapping[str, Any]) -> list[Weight]:
    H, F = config["hidden_size"], config["intermediate_size"]
    norm = f"{hf}.post_attention_layernorm.weight"
    hf, mg = f"{hf}.mlp", f"{mg}.mlp"
    return [
        Replicated(f"{mg}.linear_fc1.layer_norm_weight", (norm,), ((H,),)),
        GatedMLP(f"{mg}.linear_fc1.weight", _gate_up(hf), ((F, H), (F, H))),
        RowParallel(f"{mg}.linear_fc2.weight", (f"{hf}.down_proj.weight",), ((H, F),)),
    ]


def _experts(hf: str, mg: str, config: Mapping[str, Any]) -> list[Weight]:
    H, F, E = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    norm = f"{hf}.post_attention_layernorm.weight"
    weights: list[Weight] = [
        Replicated(f"{mg}.pre_mlp_layernorm.weight", (norm,), ((H,),)),
        Replicated(f"{mg}.mlp.router.weight", (f"{hf}.mlp.gate.weight",), ((E, H),)),
    ]
    for e in range(E):
        source, target = f"{hf}.mlp.experts.{e}", f"{mg}.mlp.experts.experts.{e}"
        weights += [
            ExpertGatedMLP(f"{target}.linear_fc1.weight", _gate_up(source), ((F, H), (F, H)), e, E),
            ExpertRowParallel(f"{target}.linear_fc2.weight", (f"{source}.down_proj.weight",), ((H, F),), e, E),
        ]
    return weights
