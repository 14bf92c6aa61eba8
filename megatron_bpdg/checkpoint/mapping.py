"""Which HF tensors make which Megatron-Core tensors, one table per model family.

Tables are built afresh for every config and never stored on a class or module: a tied model must not be able to change
the mapping of an untied one that lives beside it (the usual pair in distillation).

To add a family: write a function like `qwen3` from the patterns, and add it to `mapping_for`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_bpdg.checkpoint.patterns import (
    QKV,
    ColumnParallel,
    GatedMLP,
    Replicated,
    RowParallel,
    Shape,
    VocabRows,
    Weight,
)

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LM_HEAD = "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Nearest-name search is quadratic; the names themselves are always listed in full.
_MAX_SUGGESTIONS = 40


class MappingError(ValueError):
    """The tensors of a checkpoint or model are not those that its config asks for."""


@dataclass(frozen=True)
class ModelMapping:
    """All weights of one model, in the fixed order in which they are written and streamed.

    Attributes:
        weights: one entry per Megatron tensor; for a tied model the output layer is not among them.
        tied: whether the output layer shares the embedding.
        aliases: suffix of a parameter in the torch-only spec -> suffix under which it is stored.
    """

    weights: tuple[Weight, ...]
    tied: bool
    aliases: tuple[tuple[str, str], ...] = ()

    @cached_property
    def by_key(self) -> dict[str, Weight]:
        return {weight.key: weight for weight in self.weights}

    @property
    def embedding(self) -> Weight:
        return self.by_key[EMBEDDING]

    def canonical(self, name: str) -> str:
        """Stored name of a parameter of either layer spec (already with its global layer index)."""
        layer = _LAYER.match(name)
        if layer:
            for local, stored in self.aliases:
                if name == f"{layer.group()}{local}":
                    return f"{layer.group()}{stored}"
        return name

    def weight_for(self, key: str) -> Weight:
        """Entry of a canonical key; for a tied model a second copy of the output layer is the embedding's.

        Raises:
            KeyError: where the model has no such tensor.
        """
        if self.tied and key == OUTPUT_LAYER:
            return self.embedding
        return self.by_key[key]

    def hf_tensors(self, lm_head: bool = False) -> dict[str, Shape]:
        """Names and shapes of the HF checkpoint; `lm_head` adds the redundant head of a tied model."""
        tensors = {
            name: shape
            for weight in self.weights
            for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
        }
        if self.tied and lm_head:
            tensors[LM_HEAD] = self.embedding.hf_shapes[0]
        return tensors

    def check_hf(self, found: Mapping[str, Shape], where: str) -> None:
        """Raise MappingError, listing every problem, unless `found` is exactly this model's HF checkpoint.

        A tied model may carry `lm_head.weight` or not.
        """
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
    """The table of the model that an HF config (see `hf.read_hf_config`) describes.

    Args:
        config: normalised config.json.
        padded_vocab_size: vocabulary rows of the Megatron model over all ranks; None: the true vocabulary.

    Raises:
        ValueError: for a model family without a table.
    """
    families = {"qwen3": qwen3}
    family = families.get(config["model_type"])
    if family is None:
        raise ValueError(f"model_type {config['model_type']!r} has no weight mapping; supported: {', '.join(families)}")
    return family(config, padded_vocab_size)


def qwen3(config: Mapping[str, Any], padded_vocab_size: int | None = None) -> ModelMapping:
    """Qwen3 dense: RMSNorm on q and k, gated MLP, no biases."""
    H, F, V, D = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q_rows, kv_rows = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    tied = bool(config["tie_word_embeddings"])

    def layer(i: int) -> list[Weight]:
        hf, mg = f"model.layers.{i}", f"decoder.layers.{i}"
        attention, mlp = f"{mg}.self_attention", f"{mg}.mlp"
        qkv = tuple(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv")
        gate_up = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
        return [
            Replicated(f"{attention}.linear_qkv.layer_norm_weight", (f"{hf}.input_layernorm.weight",), ((H,),)),
            QKV(f"{attention}.linear_qkv.weight", qkv, ((q_rows, H), (kv_rows, H), (kv_rows, H)), head_dim=D),
            Replicated(f"{attention}.q_layernorm.weight", (f"{hf}.self_attn.q_norm.weight",), ((D,),)),
            Replicated(f"{attention}.k_layernorm.weight", (f"{hf}.self_attn.k_norm.weight",), ((D,),)),
            RowParallel(f"{attention}.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), ((H, q_rows),)),
            Replicated(f"{mlp}.linear_fc1.layer_norm_weight", (f"{hf}.post_attention_layernorm.weight",), ((H,),)),
            GatedMLP(f"{mlp}.linear_fc1.weight", gate_up, ((F, H), (F, H))),
            RowParallel(f"{mlp}.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), ((H, F),)),
        ]

    weights: list[Weight] = [VocabRows(EMBEDDING, (HF_EMBEDDING,), ((V, H),), padded_vocab_size)]
    for i in range(config["num_hidden_layers"]):
        weights += layer(i)
    weights.append(Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), ((H,),)))
    if not tied:
        weights.append(VocabRows(OUTPUT_LAYER, (LM_HEAD,), ((V, H),), padded_vocab_size))
    aliases = (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    )
    return ModelMapping(tuple(weights), tied, aliases)


__all__ = [
    "QKV",
    "ColumnParallel",
    "GatedMLP",
    "MappingError",
    "ModelMapping",
    "Replicated",
    "RowParallel",
    "VocabRows",
    "Weight",
    "mapping_for",
    "qwen3",
]
