"""HF's config.json: every field is mapped, known to change nothing, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bpdg.models.families import FAMILIES
from megatron_bpdg.models.rope import ROPE_SCALINGS

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
)
_REQUIRED_MOE = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
_MAPPED = {
    *_REQUIRED,
    "model_type",
    "head_dim",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "dtype",
    "torch_dtype",
}
_MAPPED_MOE = {*_REQUIRED_MOE, "num_local_experts", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
# The only values for which HF's model is the one that Megatron-Core builds.
_FIXED: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "Megatron-Core ties a bias of the output projection to biases everywhere"),
    "mlp_bias": (False, "Megatron-Core ties a bias of the MLP to biases everywhere"),
    "hidden_act": ("silu", "the gated MLP is built with silu"),
    "attention_dropout": (0.0, "models are built without dropout"),
    "pretraining_tp": (1, "slicing the matrices changes the arithmetic"),
    "partial_rotary_factor": (1.0, "rotary embeddings cover the whole head"),
    "chunk_size_feed_forward": (0, "the MLP is not chunked"),
    "is_encoder_decoder": (False, "only decoders are converted"),
    "use_sliding_window": (False, "sliding-window attention is not supported"),
    "quantization_config": (None, "quantised checkpoints are not supported; use the bf16 or fp32 release"),
}
# Neither weights nor forward pass depend on these.
_WITHOUT_EFFECT = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "initializer_range",
    "layer_types",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sliding_window",
    "transformers_version",
    "use_cache",
}


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a supported model (`families.FAMILIES`), as transformers 4 or 5 write it.

    Args:
        path: model directory or the file itself.

    Returns:
        All fields of the file, with these filled in whichever way the file spells them: `rope_theta`, `rope_scaling`
        (None, or transformers' fields with `rope_type` "yarn" or "llama3", `factor` and
        `original_max_position_embeddings` always among them), `dtype` (a string, or None), `head_dim`,
        `num_key_value_heads`, `tie_word_embeddings`; with experts also `num_experts`, `norm_topk_prob`,
        `decoder_sparse_step` and `mlp_only_layers`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: listing every missing field, every feature that is not supported and every unknown field.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: expected an HF model directory with a config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {type(config).__name__}, expected an object with the model's fields")
    problems = _unsupported(config)
    if not problems:
        _normalise(config)
        problems = _missing(config)
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    return config


def hf_config_of(folder: Path | None, where: Path) -> dict[str, Any]:
    """Config in the hf folder of the Megatron checkpoint `where`.

    Raises:
        FileNotFoundError: it has no such folder; says what to do.
        ValueError: see `read_hf_config`.
    """
    if folder is None:
        raise FileNotFoundError(
            f"{where} has no hf/config.json (it was not written by this program): copy the config.json and tokenizer "
            "files of its HF model to an hf folder there, or to convert, give that model's directory (--hf-source)"
        )
    return read_hf_config(folder)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return [f"model_type {kind!r} is not supported (supported: {', '.join(FAMILIES)})"]
    problems = []
    family = FAMILIES[kind]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        problems.append(f"architectures {architectures} is not supported (only {family.architecture!r})")
    for name, (value, reason) in _FIXED.items():
        if (found := config.get(name)) is not None and found != value:
            problems.append(f"{name} {_shown(found)} is not supported, only {_shown(value)}: {reason}")
    if sliding := sorted({kind for kind in config.get("layer_types") or () if kind != "full_attention"}):
        problems.append(f"layer_types {', '.join(sliding)} are not supported (only full_attention)")
    problems += _rope_problems(config)
    known = _MAPPED | _FIXED.keys() | _WITHOUT_EFFECT | (_MAPPED_MOE if family.moe else set())
    # Private bookkeeping of transformers starts with "_"; what is off or empty cannot change the model.
    unknown = [name for name, value in config.items() if name not in known and value and not name.startswith("_")]
    if unknown:
        problems.append(
            f"unknown field(s) {', '.join(unknown)}, which might change the model: remove what is known not to"
        )
    return problems


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary fields of either spelling together; `rope_parameters` (transformers 5) wins."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
    rope = _rope(config)
    spelling = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return [f"{spelling}.partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1"]
    if kind == "default":
        return []
    if kind not in ROPE_SCALINGS:
        return [f"{spelling} of type {kind!r} is not supported (only 'default', {', '.join(map(repr, ROPE_SCALINGS))})"]
    known = ROPE_SCALINGS[kind].__dataclass_fields__.keys()
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = [name for name, value in rope.items() if value is not None and name not in known | common]
    problems = [f"{spelling}.{name} is not known for type {kind!r}" for name in unknown]
    required = {"factor"} if kind == "yarn" else known
    problems += [f"{spelling}.{name} is missing" for name in sorted(required) if rope.get(name) is None]
    return problems


def _normalise(config: dict[str, Any]) -> None:
    family = FAMILIES[config["model_type"]]
    rope = _rope(config)
    if config.get("rope_theta") is None:
        config["rope_theta"] = rope.get("rope_theta") or family.rope_theta
    config["rope_scaling"] = None
    if (scaling := rope["rope_type"]) != "default":
        config["rope_scaling"] = {
            "original_max_position_embeddings": config.get("original_max_position_embeddings")
            or config.get("max_position_embeddings"),
            **{name: rope[name] for name in ROPE_SCALINGS[scaling].__dataclass_fields__ if rope.get(name) is not None},
            "rope_type": scaling,
        }
    dtype = config.get("dtype") or config.get("torch_dtype")
    config["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads if family.all_heads_have_keys else None
    if config.get("head_dim") is None and heads and config.get("hidden_size"):
        config["head_dim"] = family.head_dim or config["hidden_size"] // heads
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    if family.moe:
        config["num_experts"] = config.get("num_experts") or config.get("num_local_experts")
        config["norm_topk_prob"] = bool(config.get("norm_topk_prob", False))
        config["decoder_sparse_step"] = config.get("decoder_sparse_step") or 1
        config["mlp_only_layers"] = list(config.get("mlp_only_layers") or ())


def _missing(config: Mapping[str, Any]) -> list[str]:
    required = _REQUIRED + (_REQUIRED_MOE if FAMILIES[config["model_type"]].moe else ())
    problems = [f"{name} is missing" for name in required if config.get(name) is None]
    scaling = config["rope_scaling"]
    if scaling and scaling["original_max_position_embeddings"] is None:
        problems.append("rope_scaling.original_max_position_embeddings and max_position_embeddings are missing")
    return problems
