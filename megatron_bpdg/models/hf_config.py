"""HF's config.json: every field is mapped, known to change nothing, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_bpdg.models.families import FAMILIES
from megatron_bpdg.models.hf_fields import (
    COUNTS,
    FIXED,
    MAPPED,
    MAPPED_MOE,
    NUMBERS,
    REQUIRED,
    REQUIRED_MOE,
    ROPE_SECTIONS,
    SWITCHES,
    SYNONYMS,
    WITHOUT_EFFECT,
)
from megatron_bpdg.models.rope import ROPE_SCALINGS


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
        ValueError: listing every field with a value of another kind; else every one that is given twice, and not the
            same; else every missing field, every feature that is not supported and every unknown field.
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
    problems = _mistyped(config) or _given_twice(config) or _unsupported(config)
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


def _mistyped(config: Mapping[str, Any]) -> list[str]:
    """Numbers as text, fractions of layers, sections that are none: what Python would compute with all the same."""
    problems = []
    sections = {name: config[name] for name in ROPE_SECTIONS if config.get(name) is not None}
    for name, section in sections.items():
        if not isinstance(section, dict):
            problems.append(f"{name} {_shown(section)} should be an object")
    checks: tuple[tuple[set[str], Callable[[Any], bool], str], ...] = (
        (COUNTS, lambda value: type(value) is int and value > 0, "a whole number above 0"),
        (NUMBERS, lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
        (SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        ({"model_type"}, lambda value: isinstance(value, str), "a text"),
        (
            {"mlp_only_layers", "layer_types", "architectures"},
            lambda value: isinstance(value, list) and all(type(entry) in (int, str) for entry in value),
            "a list",
        ),
    )
    for place, fields in (("", config), *((f"{name}.", s) for name, s in sections.items() if isinstance(s, dict))):
        for names, fits, words in checks:
            for name in fields.keys() & names:
                if fields[name] is not None and not fits(fields[name]):
                    problems.append(f"{place}{name} {_shown(fields[name])} should be {words}")
    return sorted(problems)


def _given_twice(config: Mapping[str, Any]) -> list[str]:
    """Spellings that contradict each other. Which of them counts depends on the version of transformers."""
    problems = [
        f"{one} {_shown(config[one])} and {other} {_shown(config[other])} are two names of one field: keep one"
        for one, other in SYNONYMS
        if config.get(one) is not None and config.get(other) is not None and config[one] != config[other]
    ]
    sections = {name: _rope_section(config, name) for name in ROPE_SECTIONS if config.get(name)}
    for name, section in sections.items():
        kinds = {config[name][key] for key in ("rope_type", "type") if config[name].get(key) is not None}
        if len(kinds) > 1:
            problems.append(f"{name} has two types, {' and '.join(map(_shown, sorted(kinds)))}: keep one")
        problems += [
            f"{field} {_shown(config[field])} and {name}.{field} {_shown(section[field])} differ: keep one"
            for field in ("rope_theta", "original_max_position_embeddings")
            if config.get(field) is not None and section.get(field) not in (None, config[field])
        ]
    if len(sections) == 2:
        new, old = sections.values()
        if differing := sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name)):
            problems.append(
                f"rope_parameters and rope_scaling differ in {', '.join(differing)}: keep one of the sections"
            )
    return problems


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return [f"model_type {kind!r} is not supported (supported: {', '.join(FAMILIES)})"]
    problems = []
    family = FAMILIES[kind]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        problems.append(f"architectures {architectures} is not supported (only {family.architecture!r})")
    for name, (value, reason) in FIXED.items():
        if (found := config.get(name)) is not None and found != value:
            problems.append(f"{name} {_shown(found)} is not supported, only {_shown(value)}: {reason}")
    if sliding := sorted({kind for kind in config.get("layer_types") or () if kind != "full_attention"}):
        problems.append(f"layer_types {', '.join(sliding)} are not supported (only full_attention)")
    problems += _rope_problems(config)
    known = MAPPED | FIXED.keys() | WITHOUT_EFFECT | (MAPPED_MOE if family.moe else set())
    # Whatever its value: for a field that is not known, what looks off or empty may be what changes the model.
    unknown = [name for name in config if name not in known]
    if unknown:
        problems.append(
            f"unknown field(s) {', '.join(unknown)}, which might change the model: remove what is known not to"
        )
    return problems


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rope_section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of a rotary section that are not null, its type under one name."""
    section = {key: value for key, value in config[name].items() if value is not None}
    kind = section.pop("type", "default")
    return {"rope_type": kind, **section}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary section, in whichever spelling it is given."""
    given = [name for name in ROPE_SECTIONS if config.get(name)]
    return _rope_section(config, given[0]) if given else {"rope_type": "default"}


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
    rope = _rope(config)
    spelling = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return [f"{spelling}.partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1"]
    if kind not in ("default", *ROPE_SCALINGS):
        return [f"{spelling} of type {kind!r} is not supported (only 'default', {', '.join(map(repr, ROPE_SCALINGS))})"]
    fields = ROPE_SCALINGS[kind].__dataclass_fields__.keys() if kind in ROPE_SCALINGS else set()
    unknown = [name for name in rope if name not in fields | {"rope_type", "rope_theta", "partial_rotary_factor"}]
    problems = [f"{spelling}.{name} is not known for type {kind!r}" for name in unknown]
    required = {"factor"} if kind == "yarn" else fields
    problems += [f"{spelling}.{name} is missing" for name in sorted(required) if name not in rope]
    return problems


def _normalise(config: dict[str, Any]) -> None:
    family = FAMILIES[config["model_type"]]
    rope = _rope(config)
    if config.get("rope_theta") is None:
        config["rope_theta"] = rope.get("rope_theta") or family.rope_theta
    scaling = rope["rope_type"]
    config["rope_scaling"] = None
    if scaling != "default":
        config["rope_scaling"] = {
            "original_max_position_embeddings": config.get("original_max_position_embeddings")
            or config.get("max_position_embeddings"),
            **{name: rope[name] for name in ROPE_SCALINGS[scaling].__dataclass_fields__ if name in rope},
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
    required = REQUIRED + (REQUIRED_MOE if FAMILIES[config["model_type"]].moe else ())
    problems = [f"{name} is missing" for name in required if config.get(name) is None]
    scaling = config["rope_scaling"]
    if scaling and scaling["original_max_position_embeddings"] is None:
        problems.append("rope_scaling.original_max_position_embeddings and max_position_embeddings are missing")
    return problems
