"""Write docs/configuration.md from the schema of the config.

python tools/configuration_page.py > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_bpdg.config import json_schema
from megatron_bpdg.config.section import Section

HEAD = """# Configuration

Made from the schema by `tools/configuration_page.py`; a test fails where it is not up to date. `bpdg schema` prints the
same for editors, and `docs/concepts.md` says what is computed.

A run is one YAML file. Unknown keys are errors. `section.field=value` behind `bpdg train FILE` overrides a field; the
value is YAML. Relative paths start at the working directory. "required" stands where there is no default.
"""
# What needs no words in the schema.
PLAIN = {
    "RunConfig.kind": "on-policy distillation, or supervised fine-tuning on given responses",
    "RunConfig.seed": "of prompts' order, sampling and fresh weights",
    "Data.max_prompt_tokens": "longest prompt, in tokens, chat template included",
    "Evaluation.k": "the k of pass@k, each at most `samples`",
    "Logging.tensorboard": "write scalars for TensorBoard into the output directory",
    "Rollout.prompts_per_step": "prompts of one step",
    "Rollout.samples_per_prompt": "responses to each",
    "Sampling.temperature": "of sampling, and of all log-probs",
    "Sampling.top_p": "sample from the most likely tokens of this mass; log-probs stay those of all tokens",
    "Sampling.max_new_tokens": "longest response, in tokens",
    "Teacher.dtype": "engine: megatron: compute dtype of weights and activations",
    "Training.steps": "rollout batches; kind: sft: optimizer updates",
    "Training.lr": "Adam's learning rate after the warm-up",
    "Training.lr_schedule": "constant, or cosine to 0 over all updates",
    "Training.weight_decay": "decoupled, as in AdamW",
    "Training.adam_beta1": "decay of the mean of gradients",
    "Training.adam_beta2": "decay of the mean of squared gradients",
    "Training.adam_eps": "added to the denominator",
    "Training.clip_grad": "largest norm of the whole gradient",
    "Fixed.size": "response tokens per block",
    "Newline.min_size": "shorter spans are merged forward, in tokens",
    "Newline.max_size": "longer spans are cut into chunks of at most this many tokens",
    "TeacherTopK.top_k": "ids of the teacher's support",
    "TeacherTopK.divergence": "on the support",
    "TeacherTopK.jsd_beta": "divergence: jsd: weight of the teacher in the mixture",
    "FullVocabulary.jsd_beta": "name: jsd: weight of the teacher in the mixture",
    "GateConfig.partition": "into the blocks over which drift is averaged",
    "RunConfig.teacher": "kind: opd: needed",
    "RunConfig.objective": "the per-token loss",
    "RunConfig.logging": "where metrics go beside the JSONL files of the output directory",
}
JSON_TYPES = {"string": "text", "boolean": "true or false"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def page() -> str:
    """The whole page."""
    schema = json_schema()
    sections = schema["$defs"]
    parts = [HEAD, *table("RunConfig", schema, sections)]
    places = {name: list(dict.fromkeys(found)) for name, found in places_of(schema, sections).items()}
    for name, found in places.items():
        section = sections[name]
        title = ", ".join(f"`{place}`" for place in found)
        parts += [f"## {title}", section.get("description", "").replace("\n", " "), *table(name, section, sections)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def places_of(schema: dict[str, Any], sections: dict[str, Any]) -> dict[str, list[str]]:
    """Section -> the dotted fields that hold it, in the order of the file; variants say their name."""
    places: dict[str, list[str]] = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for field, spec in section["properties"].items():
            for name in references(spec):
                variant = sections[name]["properties"].get("name", {})
                chosen = [*variant.get("enum", []), *([variant["const"]] if "const" in variant else [])]
                inside = f"{prefix}{field}" + ("[]" if spec.get("type") == "array" else "")
                own = [f"{inside}: {{name: {' | '.join(chosen) or 'module:Class'}}}"] if variant else [inside]
                places.setdefault(name, []).extend(own)
                walk(sections[name], f"{inside}.")

    walk(schema, "")
    return places


def references(spec: Any) -> Iterator[str]:
    """Sections that a field may hold."""
    if isinstance(spec, dict):
        if "$ref" in spec:
            yield spec["$ref"].rpartition("/")[2]
        for key, value in spec.items():
            if key in ("anyOf", "oneOf", "allOf", "items"):
                for part in value if isinstance(value, list) else [value]:
                    yield from references(part)


def table(name: str, section: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    """One row per field; the `name` of a variant stands in the title already."""
    rows = []
    for field, spec in section["properties"].items():
        if field == "name" and "description" not in spec:
            continue
        key = f"{name.replace('DriftGate', 'GateConfig')}.{field}"
        words = spec.get("description") or PLAIN.get(key) or sections_words(spec, sections)
        if not words:
            raise SystemExit(f"error: {key} has no description: give its Field one")
        row = [f"`{field}`", type_of(spec), default_of(name, field, spec, section), words]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    if not rows:
        return []
    return ["\n".join(["| field | type | default | |", "|---|---|---|---|", *rows])]


def sections_words(spec: dict[str, Any], sections: dict[str, Any]) -> str:
    """A section's own first sentence."""
    return next((sections[name].get("description", "").partition("\n")[0] for name in references(spec)), "")


def type_of(spec: dict[str, Any]) -> str:
    """In words, bounds included."""
    if "$ref" in spec:
        return "section"
    for union in ("anyOf", "oneOf"):
        if union in spec:
            return " or ".join(dict.fromkeys(map(type_of, spec[union])))
    if "enum" in spec or "const" in spec:
        return " | ".join(f"`{yaml(value)}`" for value in spec.get("enum") or [spec["const"]])
    match spec.get("type"):
        case "array":
            return f"list of {type_of(spec['items'])}"
        case "object":
            values = spec.get("additionalProperties")
            return f"name: {type_of(values)}" if isinstance(values, dict) else "name: value"
        case "string" if spec.get("format") == "path":
            return "path"
    bounds = "".join(f" {sign} {spec[key]:g}" for key, sign in BOUNDS.items() if key in spec)
    return JSON_TYPES.get(spec["type"], spec["type"]) + bounds


def default_of(name: str, field: str, spec: dict[str, Any], section: dict[str, Any]) -> str:
    """As it stands in YAML; a section that the file lacks has its own fields' defaults."""
    if field in section.get("required", []):
        return "required"
    if "$ref" in spec:
        return "its defaults"
    # The schema does not know what a factory makes.
    default = (
        spec["default"]
        if "default" in spec
        else models()[name].model_fields[field].get_default(call_default_factory=True)
    )
    return f"`{yaml(default)}`"


def models(base: type[Section] = Section) -> dict[str, type[Section]]:
    """All sections by the name of their class."""
    return {base.__name__: base} | {
        name: model for below in base.__subclasses__() for name, model in models(below).items()
    }


def yaml(value: Any) -> str:
    """One line of it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(page(), end="")
