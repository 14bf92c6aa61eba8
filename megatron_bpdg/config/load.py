"""From a YAML file and command-line overrides to a validated `RunConfig`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_bpdg.config.messages import explain, section_at
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.config.yaml_text import dump_yaml, parse_yaml


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem found, one a line."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides in their order, validate.

    An override is ``section.field=value`` with a YAML value: ``training.lr=1e-6``, ``gate=null``,
    ``evaluation.k=[1,4]``, ``gate.partition={name: newline}``. A field of a section that the file does not have
    changes that section's default. Relative paths are left as they are: they start at the working directory.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or fails validation.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(str(path), [f"should hold the sections of a run, holds {found}"])
    problems = [problem for override in overrides if (problem := _apply_override(raw, override))]
    try:
        cfg = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [explain(detail, RunConfig, raw) for detail in error.errors(include_url=False)]
        raise ConfigError(str(path), problems) from error
    if problems:
        raise ConfigError(str(path), problems)
    return cfg


def check_paths(cfg: RunConfig) -> None:
    """Raise ConfigError listing every file or directory that the config names and that does not exist.

    Data must be files. The output directory is not checked: the run makes it.
    """
    problems = []
    for name, path in _paths(cfg):
        if name == "output":
            continue
        if not path.exists():
            problems.append(f"{name}: {path} does not exist")
        elif name.startswith(("data.", "evaluation.data.")) and not path.is_file():
            problems.append(f"{name}: {path} is not a file")
    if problems:
        remedy = f"relative paths start at {Path.cwd()}; neither `~` nor names of hub repositories are resolved"
        raise ConfigError(f"paths of the config ({remedy})", problems)


def dump_config(cfg: RunConfig) -> str:
    """YAML with every field, defaults included; `load_config` of it gives an equal config."""
    return dump_yaml(cfg.model_dump(mode="json"))


def input_paths(cfg: RunConfig) -> dict[str, Path]:
    """Every path the run reads, by its dotted field name."""
    return {name: path for name, path in _paths(cfg) if name != "output"}


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the YAML file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def _apply_override(raw: dict[str, Any], override: str) -> str | None:
    """Change `raw` in place; returns what is wrong with the override, if anything."""
    name, _, text = override.partition("=")
    *parents, last = name.split(".")
    if not text or not all([*parents, last]):
        return f"override {override!r}: should be field=value, such as training.lr=1e-6 or gate=null"
    try:
        value = parse_yaml(text)
    except ValueError as error:
        return f"override {override!r}: the value is not YAML ({error})"
    node = raw
    for depth, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = _default_section(raw, parents[: depth + 1])
        if not isinstance(node[part], dict):
            return f"override {override!r}: {'.'.join(parents[: depth + 1])} = {node[part]!r} is not a section"
        node = node[part]
    node[last] = value
    return None


def _default_section(raw: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """What a section that the file lacks stands for; matters where the default is one variant among several."""
    owner = section_at(RunConfig, raw, path[:-1])
    field = owner.model_fields.get(path[-1]) if owner else None
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    return default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else {}


def _paths(value: object, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every path of a section, with its dotted name."""
    if isinstance(value, Path):
        yield prefix, value
        return
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _paths(child, f"{prefix}.{name}" if prefix else str(name))
